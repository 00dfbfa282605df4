"""Randomness as a function: (seed, stream, index) -> generator. The only place that seeds.

No generator is ever carried from one step to the next, so a run that stops and goes on draws the
same numbers as one that never stopped.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STREAMS = ("init", "order", "augment", "dropout", "split", "shapes", "explain", "export", "sweep")


def derive_seed(seed: int, stream: str, index: int = 0) -> int:
    """Return a 63-bit seed, the same on every platform, independent between streams and indices.

    Raises:
        ValueError: the stream is not one of STREAMS.
    """
    if stream not in STREAMS:
        raise ValueError(f"unknown random stream {stream!r}, not one of {STREAMS}")
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """Return a CPU generator for one draw site, e.g. ``generator(seed, "order", epoch)``."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, index))


@contextmanager
def seeded(seed: int, stream: str, index: int = 0, *, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside the block, as dropout draws from them; then restore."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(derive_seed(seed, stream, index))
        yield
