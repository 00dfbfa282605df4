"""Every fault as often as ``make faults`` tries it."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from faults import damage, disk, kills, not_finite, stops
from faults.tally import Tally
from vitrail.config.files import from_json

CONFIG = {
    "model": {
        "image_size": 32, "patch_size": 8, "embed_dim": 12, "n_layers": 1, "n_attention_heads": 3,
    },
    "data": {"dataset": "shapes", "num_train_images": 90, "num_test_images": 70},
    "augment": {"randaugment_ops": 1},
    "training": {"batch_size": 40, "epochs": 4, "warmup_epochs": 0.5, "ema_decay": 0.9},
}  # fmt: skip
"""The run that is damaged inside this process; those in processes of their own: child.WORDS."""


def all_faults() -> list[Callable[[Path], Tally]]:
    """Return every fault in its long form, the longest first."""
    config = from_json(CONFIG)
    return [
        lambda folder: kills.every_point(folder, epochs=2),
        lambda folder: disk.every_error(folder, epochs=2),
        lambda folder: kills.storm(folder, kills=60, seed=1),
        lambda folder: kills.storm(folder, kills=60, recipe="Muon", seed=2),
        lambda folder: disk.folders_not_flushed(folder),
        lambda folder: disk.full_disk(folder, sizes=40),
        lambda folder: disk.read_only(folder, times=10),
        lambda folder: disk.removed(folder, times=20),
        lambda folder: disk.clock(folder, times=10),
        lambda folder: damage.mutations(folder, config, times=500, ends=50),
        lambda folder: stops.asked(folder, times=40),
        lambda folder: stops.early(folder, times=10),
        lambda folder: stops.twice(folder, times=6),
        lambda folder: stops.two_runs(folder, times=10),
        lambda folder: stops.race(folder, times=10),
        lambda folder: not_finite.injected(folder, config),
    ]


def attempt(number: int, folder: Path) -> tuple[Tally, float]:
    """Try one fault; return its figures and the seconds it took."""
    torch.set_num_threads(1)
    start = time.monotonic()
    tally = all_faults()[number](folder / str(number))
    shutil.rmtree(folder / str(number), ignore_errors=True)
    return tally, time.monotonic() - start
