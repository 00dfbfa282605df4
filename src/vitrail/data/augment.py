"""Random augmentations of whole batches: pure functions of the images and a generator.

All random numbers are drawn on the CPU and applied on the images' device, so every device sees the
same pictures.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.fills import FILLS, fill_images, spread
from vitrail.data.images import to_gray

BINS = 31
"""Magnitudes run from 0 to 30."""
HIGHEST = {
    "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331, "TranslateY": 150 / 331, "Rotate": 30.0,
    "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9, "Sharpness": 0.9,
}  # fmt: skip
"""Strength at magnitude 30 of the operations with a random sign; of translations, per side."""
FIXED = 1 << 16
"""Pillow computes affine coordinates in 16.16 fixed point."""


def random_crop(raw_BCHW: Tensor, generator: torch.Generator, padding: int) -> Tensor:
    """Pad with black on every side and crop to the original size at a random position."""
    B, C, H, W = raw_BCHW.shape
    down_B, right_B = torch.randint(-padding, padding + 1, (2, B), generator=generator)
    rows_BH = torch.arange(H) + down_B[:, None]
    columns_BW = torch.arange(W) + right_B[:, None]
    inside_rows_BH = (rows_BH >= 0) & (rows_BH < H)
    inside_columns_BW = (columns_BW >= 0) & (columns_BW < W)
    inside_BHW = inside_rows_BH[:, :, None] & inside_columns_BW[:, None, :]
    index_BHW = rows_BH.clamp(0, H - 1)[:, :, None] * W + columns_BW.clamp(0, W - 1)[:, None, :]
    index_B1N = index_BHW.view(B, 1, H * W).to(raw_BCHW.device)  # expanded there: less to copy
    cut_BCHW = raw_BCHW.flatten(2).gather(2, index_B1N.expand(B, C, -1)).view(B, C, H, W)
    cut_BCHW *= inside_BHW[:, None].to(raw_BCHW.device)
    return cut_BCHW


def random_flip(raw_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image horizontally with probability 0.5."""
    flipped_B = torch.randint(2, (len(raw_BCHW),), generator=generator, dtype=torch.bool)
    return flip(raw_BCHW, flipped_B)


def flip(raw_BCHW: Tensor, flipped_B: Tensor) -> Tensor:
    """Flip the chosen images horizontally."""
    flipped_B111 = flipped_B.view(-1, 1, 1, 1).to(raw_BCHW.device)
    return torch.where(flipped_B111, raw_BCHW.flip(3), raw_BCHW)


def random_erasing(raw_BCHW: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Overwrite a rectangle of some images with random bytes.

    Its area is uniform in 2 to 33% of the image, its aspect ratio log-uniform in 0.3 to 3.3; sides
    are clipped to the image's. Random bytes, since a constant would be a feature to learn.

    Source: Zhong et al. 2020, arXiv:1708.04896.
    """
    B, C, H, W = raw_BCHW.shape
    chosen_B, area_B, aspect_B, top_B, left_B = torch.rand(5, B, generator=generator)
    area_B = (0.02 + 0.31 * area_B) * H * W
    aspect_B = 0.3 * (3.3 / 0.3) ** aspect_B
    height_B = (area_B * aspect_B).sqrt().round().clamp(1, H)
    width_B = (area_B / aspect_B).sqrt().round().clamp(1, W)
    box_BHW = _box(
        top_B * (H - height_B), left_B * (W - width_B), height_B, width_B, size_hw=(H, W)
    )
    # Drawn for every image, so that its bytes do not depend on which images are chosen.
    noise_BCHW = torch.randint(256, (B, C, H, W), generator=generator, dtype=torch.uint8)
    chosen = (chosen_B < probability).nonzero().flatten()
    there = chosen.to(raw_BCHW.device)
    box_B1HW, noise_BCHW = (t[chosen].to(raw_BCHW.device) for t in (box_BHW[:, None], noise_BCHW))
    erased_BCHW = raw_BCHW.clone()
    erased_BCHW[there] = torch.where(box_B1HW, noise_BCHW, raw_BCHW[there])
    return erased_BCHW


def patch_drop(images_BCHW: Tensor, generator: torch.Generator, patch_size: int) -> Tensor:
    """Replace some patches of each image by its mean color or, for the whole batch, a blurred copy.

    The share of patches is uniform in 0 to 1. Scores of maps remove patches in the same way, so
    that the model has been trained on such images.

    Source: Covert et al. 2022, arXiv:2206.05282, section 4.1.
    """
    B, _, H, W = images_BCHW.shape
    grid_GJ = H // patch_size, W // patch_size
    fill = FILLS[int(torch.randint(len(FILLS), (), generator=generator))]
    shares_B1 = torch.rand(B, 1, generator=generator)
    dropped_BN = torch.rand(B, grid_GJ[0] * grid_GJ[1], generator=generator) < shares_B1
    dropped_B1HW = spread(dropped_BN.to(images_BCHW.device), grid_GJ, patch_size)
    return torch.where(dropped_B1HW, fill_images(images_BCHW, fill), images_BCHW)


def mixup(
    images_BCHW: Tensor, targets_BY: Tensor, generator: torch.Generator, alpha: float
) -> tuple[Tensor, Tensor]:
    """Average each image and its target with another's, with weights from Beta(alpha, alpha).

    Source: Zhang et al. 2018, arXiv:1710.09412.
    """
    weight = _beta(alpha, generator)
    partner_B = torch.randperm(len(images_BCHW), generator=generator).to(images_BCHW.device)
    mixed_BCHW = weight * images_BCHW + (1 - weight) * images_BCHW[partner_B]
    return mixed_BCHW, weight * targets_BY + (1 - weight) * targets_BY[partner_B]


def cutmix(
    images_BCHW: Tensor, targets_BY: Tensor, generator: torch.Generator, alpha: float
) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of another image into each; targets are mixed in proportion to its area.

    Source: Yun et al. 2019, arXiv:1905.04899.
    """
    H, W = images_BCHW.shape[-2:]
    side = (1 - _beta(alpha, generator)) ** 0.5
    middle_y, middle_x = torch.rand(2, generator=generator)
    height, width = torch.tensor([round(H * side)]), torch.tensor([round(W * side)])
    pasted_1HW = _box(
        middle_y * H - height / 2, middle_x * W - width / 2, height, width, size_hw=(H, W)
    )
    share = 1 - pasted_1HW.float().mean().item()
    partner_B = torch.randperm(len(images_BCHW), generator=generator).to(images_BCHW.device)
    mixed_BCHW = torch.where(pasted_1HW.to(images_BCHW.device), images_BCHW[partner_B], images_BCHW)
    return mixed_BCHW, share * targets_BY + (1 - share) * targets_BY[partner_B]


def _box(
    top_B: Tensor, left_B: Tensor, height_B: Tensor, width_B: Tensor, *, size_hw: tuple[int, int]
) -> Tensor:
    """Return masks (B, H, W) of rectangles, clipped to the image."""
    rows_H1, columns_W = torch.arange(size_hw[0])[:, None], torch.arange(size_hw[1])
    top_B, left_B = top_B.round(), left_B.round()
    rows_BH1 = (rows_H1 >= top_B.view(-1, 1, 1)) & (rows_H1 < (top_B + height_B).view(-1, 1, 1))
    columns_B1W = (columns_W >= left_B.view(-1, 1, 1)) & (
        columns_W < (left_B + width_B).view(-1, 1, 1)
    )
    return rows_BH1 & columns_B1W


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha): X / (X + Y) of two Gamma(alpha) variables."""
    # torch's public Gamma accepts no generator; this function, which it calls, does.
    first, second = torch._standard_gamma(torch.full((2,), alpha), generator=generator).tolist()
    return first / (first + second) if first + second > 0 else 0.5


# RandAugment.


def rand_augment(
    raw_BCHW: Tensor, generator: torch.Generator, n_ops: int, magnitude: int
) -> Tensor:
    """Apply to each image ``n_ops`` operations, drawn uniformly, at ``magnitude`` (0 to 30).

    Every operation is a function ``(raw_BCHW, strength_B) -> raw_BCHW`` on uint8 with Pillow's
    arithmetic, so that the results equal Pillow's to the byte; the strengths are torchvision's.
    They are computed on the CPU in float64, and only integers and float32 are moved to the images'
    device: not every device has float64, and the results are the same on all of them.

    Source: Cubuk et al. 2020, arXiv:1909.13719.
    """
    raw_BCHW = raw_BCHW.clone()
    side_hw = (raw_BCHW.shape[-2], raw_BCHW.shape[-1])
    for _ in range(n_ops):
        op_B = torch.randint(len(OPERATIONS), (len(raw_BCHW),), generator=generator)
        sign_B = torch.randint(2, (len(raw_BCHW),), generator=generator) * 2 - 1
        for number, (name, operation) in enumerate(OPERATIONS.items()):
            chosen = (op_B == number).nonzero().flatten()
            if len(chosen) == 0:
                continue
            value, signed = strength(name, magnitude, side_hw)
            strength_B = value * (sign_B[chosen] if signed else torch.ones(len(chosen))).double()
            chosen = chosen.to(raw_BCHW.device)
            raw_BCHW[chosen] = operation(raw_BCHW[chosen], strength_B)
    return raw_BCHW


def strength(name: str, magnitude: int, side_hw: tuple[int, int]) -> tuple[float, bool]:
    """Return the strength of an operation at a magnitude, and whether its sign is random.

    Units: slope (shear), pixels (translate), degrees (rotate), factor - 1 (brightness, color,
    contrast, sharpness), bits kept (posterize), lowest inverted value (solarize).
    """
    if name == "Posterize":
        return 8.0 - round(magnitude / (BINS - 1) * 4), False
    if name == "Solarize":
        return torch.linspace(255, 0, BINS)[magnitude].item(), False
    highest = HIGHEST.get(name, 0.0)
    if name.startswith("Translate"):
        highest *= side_hw[1] if name.endswith("X") else side_hw[0]
    return torch.linspace(0, highest, BINS)[magnitude].item(), name in HIGHEST


def _rotate(raw_BCHW: Tensor, degrees_B: Tensor) -> Tensor:
    """Rotate the images counterclockwise about their center."""
    height, width = raw_BCHW.shape[-2:]
    radians_B = -degrees_B * (math.pi / 180)
    cos_B, sin_B = radians_B.cos(), radians_B.sin()
    x_B = width / 2 - cos_B * (width / 2) - sin_B * (height / 2)
    y_B = height / 2 + sin_B * (width / 2) - cos_B * (height / 2)
    return _affine(raw_BCHW, xx=cos_B, xy=sin_B, x=x_B, yx=-sin_B, yy=cos_B, y=y_B)


def _affine(
    raw_BCHW: Tensor,
    *,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    y: Tensor | float = 0.0,
) -> Tensor:
    """Sample each pixel at ``(xx X + xy Y + x, yx X + yy Y + y)``: nearest, black outside.

    Pixel centers are at half-integer coordinates; coordinates are fixed-point, as in Pillow.
    """
    B, C, H, W = raw_BCHW.shape
    columns_W = torch.arange(W, device=raw_BCHW.device)
    rows_H1 = torch.arange(H, device=raw_BCHW.device)[:, None]

    def coordinate(by_x: Tensor | float, by_y: Tensor | float, offset: Tensor | float) -> Tensor:
        terms = [by_x, by_y, offset + by_x * 0.5 + by_y * 0.5]
        fixed = [torch.as_tensor(term, dtype=torch.float64) * FIXED + 0.5 for term in terms]
        step_x, step_y, start = (f.floor().long().view(-1, 1, 1).to(raw_BCHW.device) for f in fixed)
        return (start + step_x * columns_W + step_y * rows_H1) >> 16

    from_x_BHW, from_y_BHW = coordinate(xx, xy, x), coordinate(yx, yy, y)
    inside_BHW = (from_x_BHW >= 0) & (from_x_BHW < W) & (from_y_BHW >= 0) & (from_y_BHW < H)
    index_BHW = from_y_BHW.clamp(0, H - 1) * W + from_x_BHW.clamp(0, W - 1)
    index_B1N = index_BHW.expand(B, H, W).reshape(B, 1, H * W).expand(B, C, H * W)
    fetched_BCHW = raw_BCHW.flatten(2).gather(2, index_B1N).view(B, C, H, W)
    return fetched_BCHW * inside_BHW[:, None]


def _contrast(raw_BCHW: Tensor, change_B: Tensor) -> Tensor:
    """Blend the image with its mean gray."""
    gray_B1HW = to_gray(raw_BCHW).int()
    sum_B111, count = gray_B1HW.sum(dim=(2, 3), keepdim=True), gray_B1HW[0].numel()
    mean_B111 = (2 * sum_B111 + count) // (2 * count)
    return _blend(mean_B111.to(torch.uint8).expand_as(raw_BCHW), raw_BCHW, change_B)


def _sharpness(raw_BCHW: Tensor, change_B: Tensor) -> Tensor:
    """Blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, except at the border."""
    if min(raw_BCHW.shape[-2:]) < 3:
        return raw_BCHW
    values_BCHW = raw_BCHW.float()
    sum_BCHW = F.avg_pool2d(values_BCHW, 3, stride=1) * 9 + 4 * values_BCHW[..., 1:-1, 1:-1]
    smooth_BCHW = raw_BCHW.clone()
    smooth_BCHW[..., 1:-1, 1:-1] = (sum_BCHW.round() / 13 + 0.5).floor().to(torch.uint8)
    return _blend(smooth_BCHW, raw_BCHW, change_B)


def _posterize(raw_BCHW: Tensor, bits_B: Tensor) -> Tensor:
    """Keep the most significant bits of every byte."""
    mask_B = 256 - 2 ** (8 - bits_B.long())
    return raw_BCHW & mask_B.to(torch.uint8).view(-1, 1, 1, 1).to(raw_BCHW.device)


def _solarize(raw_BCHW: Tensor, threshold_B: Tensor) -> Tensor:
    """Invert the bytes at or above a threshold."""
    threshold_B111 = threshold_B.float().view(-1, 1, 1, 1).to(raw_BCHW.device)
    return torch.where(raw_BCHW < threshold_B111, raw_BCHW, 255 - raw_BCHW)


def _auto_contrast(raw_BCHW: Tensor, _strength_B: Tensor) -> Tensor:
    """Stretch each channel to the range 0 to 255."""
    pixels_BCN = raw_BCHW.flatten(2)
    low_BC1 = pixels_BCN.amin(2, keepdim=True).cpu().double()
    high_BC1 = pixels_BCN.amax(2, keepdim=True).cpu().double()
    # A tensor divided by a tensor is rounded once; a number divided by a tensor is not.
    scale_BC1 = torch.full_like(low_BC1, 255) / (high_BC1 - low_BC1)
    bytes_256 = torch.arange(256, dtype=torch.float64)
    table_BC256 = (bytes_256 * scale_BC1 - low_BC1 * scale_BC1).clamp(0, 255)
    return _look_up(raw_BCHW, torch.where(high_BC1 <= low_BC1, bytes_256, table_BC256))


def _equalize(raw_BCHW: Tensor, _strength_B: Tensor) -> Tensor:
    """Equalize the histogram of every channel."""
    B, C, H, W = raw_BCHW.shape
    pixels_BCN = raw_BCHW.flatten(2).long()
    counts_BC256 = torch.zeros(B, C, 256, dtype=torch.int32, device=raw_BCHW.device)
    counts_BC256.scatter_add_(2, pixels_BCN, torch.ones_like(pixels_BCN, dtype=torch.int32))
    last_BC1 = counts_BC256.gather(2, pixels_BCN.amax(2, keepdim=True))
    step_BC1 = (H * W - last_BC1) // 255
    below_BC256 = counts_BC256.cumsum(2) - counts_BC256
    table_BC256 = (below_BC256 + step_BC1 // 2) // step_BC1.clamp(min=1)
    bytes_256 = torch.arange(256, device=raw_BCHW.device)
    return _look_up(raw_BCHW, torch.where(step_BC1 == 0, bytes_256, table_BC256.clamp(max=255)))


def _look_up(raw_BCHW: Tensor, table_BC256: Tensor) -> Tensor:
    """Replace every byte with its entry in the table of its image and channel."""
    table_BC256 = table_BC256.to(torch.uint8).to(raw_BCHW.device)
    return table_BC256.gather(2, raw_BCHW.flatten(2).long()).view_as(raw_BCHW)


def _blend(from_BCHW: Tensor, to_BCHW: Tensor, change_B: Tensor) -> Tensor:
    """Interpolate between two images by 1 + change; extrapolate if that is above 1."""
    factor_B111 = (1 + change_B).float().view(-1, 1, 1, 1).to(from_BCHW.device)
    start_BCHW = from_BCHW.float()
    mixed_BCHW = start_BCHW + factor_B111 * (to_BCHW.float() - start_BCHW)
    return mixed_BCHW.clamp(0, 255).to(torch.uint8)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Identity": lambda raw_BCHW, _strength_B: raw_BCHW,
    "ShearX": lambda raw_BCHW, slope_B: _affine(raw_BCHW, xy=slope_B),
    "ShearY": lambda raw_BCHW, slope_B: _affine(raw_BCHW, yx=slope_B),
    "TranslateX": lambda raw_BCHW, pixels_B: _affine(raw_BCHW, x=-pixels_B.trunc()),
    "TranslateY": lambda raw_BCHW, pixels_B: _affine(raw_BCHW, y=-pixels_B.trunc()),
    "Rotate": _rotate,
    "Brightness": lambda raw_BCHW, change_B: _blend(torch.zeros_like(raw_BCHW), raw_BCHW, change_B),
    "Color": lambda raw_BCHW, change_B: _blend(
        to_gray(raw_BCHW).expand_as(raw_BCHW), raw_BCHW, change_B
    ),
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
}
