"""The fixed, stratified cut between training and validation."""

import torch
from torch import Tensor

from vitrine import rng
from vitrine.errors import ConfigError

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
    generator = rng.generator(SPLIT_SEED, "split")
    # Rank each image within its class, in a fixed random order; the lowest ranks are validation.
    order_B = torch.randperm(total, generator=generator)
    rank_B = torch.empty(total, dtype=torch.float64)
    for label in labels_B.unique():
        members = order_B[labels_B[order_B] == label]
        rank_B[members] = (torch.arange(len(members)) + 0.5).double() / len(members)
    # Equal ranks of different classes are taken in the random order: a stable sort keeps it.
    chosen = order_B[rank_B[order_B].sort(stable=True).indices[:wanted]]
    validation = torch.zeros(total, dtype=torch.bool)
    validation[chosen] = True
    return (~validation).nonzero().flatten(), validation.nonzero().flatten()
