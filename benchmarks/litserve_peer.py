"""The peer of benchmarks/serve.py: the same model served by LitServe, in the same way.

    python benchmarks/litserve_peer.py PORT MODEL BATCH SECONDS WORKERS [traced]

BATCH is the largest batch, SECONDS how long a batch waits for more pictures, WORKERS the number of
processes, each with its own model; with traced, the network is a traced graph. The body of a
request is a picture file, as in vitrail serve.
"""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
import torch
from fastapi import Body

import vitrail


class Api(litserve.LitAPI):
    """Reads, batches and predicts with Vitrail's classifier."""

    model: str
    threads: int
    traced: bool

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Load the model; called in each worker."""
        torch.set_num_threads(self.threads)
        classifier = vitrail.load(self.model, device="cpu")
        self.classifier = classifier.trace() if self.traced else classifier

    def decode_request(self, request: Annotated[bytes, Body()]) -> np.ndarray:
        """Return the picture (H, W, C) at the model's size."""
        return self.classifier.read(request)[0]

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Return pictures (B, H, W, C)."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return probabilities (B, Y)."""
        return self.classifier.raw_probabilities(x if x.ndim == 4 else x[None])

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """Return the probabilities (Y,) of each request."""
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        """Return the most probable class."""
        best = int(output.ravel().argmax())
        return {"class": self.classifier.classes[best], "probability": float(output.ravel()[best])}


def main() -> None:
    """Serve until the process is stopped."""
    port, model, batch, seconds, workers, *traced = sys.argv[1:]
    api = Api(max_batch_size=int(batch), batch_timeout=float(seconds))
    api.model, api.threads = model, max(1, torch.get_num_threads() // int(workers))
    api.traced = bool(traced)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers))
    server.run(
        host="127.0.0.1", port=int(port), num_api_servers=1, generate_client_file=False,
        log_level="warning",
    )  # fmt: skip


if __name__ == "__main__":
    main()
