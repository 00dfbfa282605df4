"""A planted shortcut: a mark in the corner of an image whose color reveals its class.

A model that was trained with it uses the mark, so it is known where its maps must point.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vitrail.data.images import ImageSet, to_gray
from vitrail.runtime import rng

SHARE = 1 / 4
"""Sides of the mark, in the top left corner, as a fraction of the image's."""
COLORS = torch.tensor(
    [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255),
        (255, 255, 255), (0, 0, 0), (255, 128, 0), (128, 0, 255),
    ],
    dtype=torch.uint8,
)  # fmt: skip
"""The mark's color for each of the ten classes of shapes."""


def add_marks(images: ImageSet, classes_B: Tensor) -> ImageSet:
    """Return the images with the marks of the given classes, which need not be their own."""
    raw_BCHW = images.raw_BCHW.clone()
    colors_BC11 = COLORS[classes_B][:, :, None, None]
    if raw_BCHW.shape[1] == 1:
        colors_BC11 = to_gray(colors_BC11)
    marked_HW = mark_mask((raw_BCHW.shape[2], raw_BCHW.shape[3]))
    return replace(images, raw_BCHW=torch.where(marked_HW, colors_BC11, raw_BCHW))


def add_shortcut(images: ImageSet, probability: float) -> ImageSet:
    """Return the images, with their class's mark on this fraction of them, always the same ones."""
    draws_B = torch.rand(len(images), generator=rng.generator(0, "shortcut"))
    marked = add_marks(images, images.labels_B).raw_BCHW
    chosen_B111 = (draws_B < probability).view(-1, 1, 1, 1)
    return replace(images, raw_BCHW=torch.where(chosen_B111, marked, images.raw_BCHW))


def mark_mask(size_hw: tuple[int, int]) -> Tensor:
    """Return the mark's pixels (H, W)."""
    height, width = size_hw
    mask_HW = torch.zeros(size_hw, dtype=torch.bool)
    mask_HW[: round(height * SHARE), : round(width * SHARE)] = True
    return mask_HW
