"""Slow imports, done once in the process that all children are forked from."""

import torch
import torch._dynamo

import vitrail.cli.progress
import vitrail.cli.train
import vitrail.data.datasets
import vitrail.training.run
from vitrail.data.shapes import SEEDS, draw_shapes

torch.set_num_threads(1)
DRAWN = {
    which: draw_shapes(count, seed=SEEDS[which])
    for which, count in {"train": 300, "test": 50}.items()
}
"""A few of the generated shapes: generating all takes seconds."""


def take_few_images() -> None:
    """Make runs load these."""
    vitrail.data.datasets.load_shapes = DRAWN.__getitem__  # type: ignore[assignment]
