"""A worker process: it builds one thing to measure, then measures when asked.

Needs torch and nothing else, so that the interpreters of other systems can import it.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Spec = dict[str, Any]
"""What to measure; the fields are told in ``jobs.py``."""
Measure = Callable[[Any], float]
"""Does the work that a request asks for; returns how much that was (images, or operations)."""


def serve(build: Callable[[Spec], tuple[Measure, dict[str, Any]]], spec: Spec) -> None:
    """Build what the spec names, say so, then measure once for every line that comes in."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to standard error

    def tell(**answer: Any) -> None:
        print(json.dumps(answer), file=channel, flush=True)

    rest_mib = peak_mib(spec["device"])
    measure, about = build(spec)
    tell(rest_mib=rest_mib, torch=torch.__version__, threads=torch.get_num_threads(), **about)
    synchronize = getattr(torch, spec["device"]).synchronize
    for line in sys.stdin:
        request = json.loads(line)
        synchronize()
        began = time.perf_counter()
        done = measure(request)
        synchronize()
        seconds = time.perf_counter() - began
        tell(done=done, seconds=seconds, peak_mib=peak_mib(spec["device"]))


def peak_mib(device: str) -> float:
    """Return the most memory held so far, in MiB: of the card, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count in what the parent held when it started us
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    import resource  # Windows has none

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def autocast(spec: Spec) -> Any:
    """Return the context in which products are of the spec's number format."""
    wanted = spec["precision"] == "bfloat16"
    return torch.autocast(spec["device"], torch.bfloat16, enabled=wanted)


def random_batch(spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels of noise, on the device."""
    torch.manual_seed(1)
    model, count = spec["model"], spec["batch_size"]
    side = model["image_size"]
    images = torch.randn(count, model["n_channels"], side, side)
    labels = torch.randint(model["n_classes"], (count,))
    return images.to(spec["device"]), labels.to(spec["device"])
