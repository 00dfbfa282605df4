"""Random augmentations of whole batches: pure functions of the images and a generator.

All random numbers are drawn on the CPU and applied on the images' device, so every device sees the
same pictures.
"""

import torch
from torch import Tensor


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
    index_B1N = index_BHW.view(B, 1, H * W).to(raw_BCHW.device)  # expanded there: less to move
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
