"""A split in memory: images as bytes, their labels, and the conversion to the model's input.

Pixels have two names: ``raw`` (uint8, 0 to 255) and ``images`` (normalized floats).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.data.pictures import Framing, Size, channel_scale, fit_picture
from vitrail.data.splits import choose, shares, validation_shares
from vitrail.runtime import rng

SPLIT_SEED = 0
"""Part of the dataset's definition, not of a run: the validation images are always the same."""


@dataclass(frozen=True)
class ImageSet:
    """Labeled images as bytes.

    Shapes:
        raw_BCHW: uint8, C is 3 (RGB) or 1 (gray); labels_B: int64;
        masks_BHW: bool, the object's pixels, where the dataset has them (shapes).
    """

    raw_BCHW: Tensor
    labels_B: Tensor
    classes: tuple[str, ...]
    masks_BHW: Tensor | None = None

    def __repr__(self) -> str:
        channels, height, width = self.raw_BCHW.shape[1:]
        classes = f"{len(self.classes)} classes"
        return f"ImageSet({len(self)} images, {channels} x {height} x {width}, {classes})"

    def __len__(self) -> int:
        return self.raw_BCHW.shape[0]

    def take(self, indices_B: Tensor) -> "ImageSet":
        """Return the images at these indices, in this order."""
        masks = None if self.masks_BHW is None else self.masks_BHW[indices_B]
        return replace(
            self,
            raw_BCHW=self.raw_BCHW[indices_B],
            labels_B=self.labels_B[indices_B],
            masks_BHW=masks,
        )

    def sample(self, count: int | None) -> "ImageSet":
        """Return a stratified subset of ``count`` images, in their order. Default: all of them.

        Which images are taken depends on their bytes alone, not on their order.
        """
        if count is None or count >= len(self):
            return self
        pixels = self.raw_BCHW.contiguous().numpy()
        hashes = [hashlib.blake2b(image, digest_size=8).digest() for image in pixels]
        return self.take(self._choose(shares(self._counts(), count), hashes))

    def shuffled(self) -> "ImageSet":
        """Return the images in a random order, always the same one."""
        return self.take(torch.randperm(len(self), generator=rng.generator(0, "shuffled")))

    def split(self, validation_images: int | None) -> tuple["ImageSet", "ImageSet"]:
        """Return the training and the validation images: stratified, fixed, each in their order.

        Default: a tenth for validation; 0 for none.

        Raises:
            ConfigError: no image would be left to train on.
        """
        order_B = torch.randperm(len(self), generator=rng.generator(SPLIT_SEED, "split"))
        counts = validation_shares(self._counts(), validation_images)
        chosen = self._choose(counts, order_B.argsort().tolist())
        in_training_B = torch.ones(len(self), dtype=torch.bool)
        in_training_B[chosen] = False
        return self.take(in_training_B.nonzero().flatten()), self.take(chosen)

    def resized(self, size_hw: Size, framing: Framing) -> "ImageSet":
        """Return the images and their masks at a size; masks keep pixels at least half covered."""
        if tuple(self.raw_BCHW.shape[-2:]) == size_hw and framing.crop_pct == 1:
            return self

        def fit_all(raw: np.ndarray) -> Tensor:
            fitted = np.empty((len(raw), *size_hw, *raw.shape[3:]), np.uint8)
            for number, picture in enumerate(raw):
                fitted[number] = fit_picture(picture, size_hw, framing)
            return torch.from_numpy(fitted)

        if self.raw_BCHW.shape[1] == 1:  # Pillow's gray pictures have no axis of channels
            raw_BCHW = fit_all(self.raw_BCHW[:, 0].numpy())[:, None]
        else:
            raw_BHWC = fit_all(self.raw_BCHW.permute(0, 2, 3, 1).numpy())
            raw_BCHW = raw_BHWC.permute(0, 3, 1, 2).contiguous()
        masks_BHW = self.masks_BHW
        if masks_BHW is not None:
            masks_BHW = fit_all(masks_BHW.numpy() * np.uint8(255)) >= 128
        return replace(self, raw_BCHW=raw_BCHW, masks_BHW=masks_BHW)

    def with_channels(self, n_channels: int) -> "ImageSet":
        """Return the images in color (3 channels), or converted to gray (1)."""
        if self.raw_BCHW.shape[1] == n_channels:
            return self
        if n_channels == 3:
            return replace(self, raw_BCHW=self.raw_BCHW.repeat(1, 3, 1, 1))
        return replace(self, raw_BCHW=to_gray(self.raw_BCHW))

    def _counts(self) -> list[int]:
        """Return the number of images of each class."""
        return self.labels_B.bincount(minlength=len(self.classes)).tolist()

    def _choose(self, counts: Sequence[int], ranks: Sequence[Any]) -> Tensor:
        """Return the indices of each class's ``counts`` images of lowest rank."""
        chosen = choose(self.labels_B.tolist(), counts, ranks)
        return torch.tensor(chosen, dtype=torch.int64)


def to_gray(raw_BCHW: Tensor) -> Tensor:
    """Return the luma of color images (B, 1, H, W), rounded like ITU-R 601 and Pillow."""
    if raw_BCHW.shape[1] == 1:
        return raw_BCHW
    r, g, b = raw_BCHW.int().unbind(1)
    luma_BHW: Tensor = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16
    return luma_BHW.to(torch.uint8).unsqueeze(1)


def normalize(raw_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert bytes to the model's input: ``(raw / 255 - mean) / std``, float32.

    Gray images use the average of the three channels' mean and std.
    """
    scale_C, shift_C = map(torch.from_numpy, channel_scale(mean, std, raw_BCHW.shape[1]))
    device = raw_BCHW.device
    return raw_BCHW * scale_C.to(device).view(-1, 1, 1) + shift_C.to(device).view(-1, 1, 1)
