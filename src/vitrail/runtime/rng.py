"""Randomness as a function: (seed, stream, index) -> generator. The only place that seeds.

No generator lives from one step to the next, so a resumed run draws the same numbers as one that
was never interrupted.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STREAMS = (
    "init", "order", "augment", "flip", "dropout", "split", "shapes", "explain", "ties", "export",
    "sweep", "orders", "sanity", "shortcut", "patch_drop", "hidden", "served", "calibration",
    "shuffled",
)  # fmt: skip
"""One for each purpose, so that no two purposes share random numbers."""


def derive_seed(seed: int, stream: str, index: int = 0) -> int:
    """Return a 63-bit seed: the same on all platforms, independent across streams and indices."""
    if stream not in STREAMS:
        raise ValueError(f"unknown random stream {stream!r}, not one of {STREAMS}")
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """Return a CPU generator for one purpose, e.g. ``generator(seed, "order", epoch)``."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, index))


@contextmanager
def seeded(seed: int, stream: str, index: int = 0, *, device: torch.device) -> Iterator[None]:
    """Seed the global generators of the CPU and of ``device``; restore them afterwards."""
    number = derive_seed(seed, stream, index)
    own = None if device.type == "cpu" else torch.get_device_module(device)
    cpu_state, own_state = torch.get_rng_state(), own.get_rng_state() if own else None
    try:
        torch.default_generator.manual_seed(number)
        if own:
            own.manual_seed(number)
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if own:
            own.set_rng_state(own_state)
