"""What replaces removed patches, in scores of maps and in training with ``patch_drop``."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Fill = Literal["mean", "blur"]
FILLS: tuple[Fill, ...] = get_args(Fill)
"""What replaces a removed patch: the image's mean color, or the blurred image."""
BLUR_SHARE = 1 / 8
"""Standard deviation of the blur as a fraction of the image's shorter side."""


def fill_images(images_BCHW: Tensor, fill: Fill) -> Tensor:
    """Return what replaces removed patches: each image's mean color, or the blurred image."""
    if fill == "mean":
        return images_BCHW.mean((2, 3), keepdim=True).expand_as(images_BCHW)
    return blur(images_BCHW, BLUR_SHARE * min(images_BCHW.shape[2:]))


def blur(images_BCHW: Tensor, deviation: float) -> Tensor:
    """Return images blurred by a Gaussian truncated at 3 deviations; the border is replicated."""
    radius = max(1, round(3 * deviation))
    offsets_X = torch.arange(-radius, radius + 1, device=images_BCHW.device)
    weights_X = (-0.5 * (offsets_X / deviation) ** 2).exp()
    C = images_BCHW.shape[1]
    kernel_C11X = (weights_X / weights_X.sum()).expand(C, 1, 1, -1)
    padded = F.pad(images_BCHW, (radius,) * 4, mode="replicate")
    along = F.conv2d(padded, kernel_C11X, groups=C)
    return F.conv2d(along, kernel_C11X.transpose(2, 3), groups=C)


def spread(patches_BxN: Tensor, grid_GJ: tuple[int, int], patch_size: int) -> Tensor:
    """Spread one value per patch over its pixels, with a channel dimension: (Bx, 1, H, W).

    Patches are counted row by row.
    """
    rows_BxGJ = patches_BxN.view(*patches_BxN.shape[:-1], *grid_GJ)
    pixels_BxHW = rows_BxGJ.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
    return pixels_BxHW.unsqueeze(-3)
