"""The fixed, stratified cut between training and validation."""

import torch
from torch import Tensor

from vitrail.data.stratify import shares
from vitrail.errors import ConfigError
from vitrail.runtime import rng

SPLIT_SEED = 0
"""Part of the data's definition, not of a run: validation images are the same in every run."""


def split_indices(labels_B: Tensor, validation_images: int | None) -> tuple[Tensor, Tensor]:
    """Return the ascending indices of the training and of the validation images.

    Each class gives its share, to within one image. ``None`` keeps a tenth back, 0 nothing.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    total = len(labels_B)
    wanted = total // 10 if validation_images is None else validation_images
    if wanted >= total:
        raise ConfigError(
            f"validation_images is {wanted}, but there are {total} training images: give fewer"
        )
    order_B = torch.randperm(total, generator=rng.generator(SPLIT_SEED, "split"))
    validation_B = torch.zeros(total, dtype=torch.bool)
    for label, share in zip(*class_shares(labels_B, wanted), strict=True):
        validation_B[order_B[labels_B[order_B] == label][:share]] = True
    return (~validation_B).nonzero().flatten(), validation_B.nonzero().flatten()


def class_shares(labels_B: Tensor, wanted: int) -> tuple[list[int], list[int]]:
    """Return the classes, and how many images each gives so that together they give ``wanted``."""
    labels, counts = labels_B.unique(return_counts=True)
    return labels.tolist(), shares(counts.tolist(), wanted)
