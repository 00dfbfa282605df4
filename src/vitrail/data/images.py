"""A split in memory, and the step from its bytes to what the model reads.

Pixels have two names: ``raw`` (uint8, 0 to 255) and ``images`` (normalised floats).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitrail.data.framing import channel_scale
from vitrail.data.split import class_shares


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, whole, as bytes.

    Shapes:
        raw_BCHW: uint8, C is 3 (RGB) or 1 (gray); labels_B: int64;
        masks_BHW: bool, the object's pixels, where the data know them (shapes).
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
        """Return a stratified subset of ``count`` images, in their order, or all of them.

        Which images are taken depends on their bytes alone, not on their order.
        """
        if count is None or count >= len(self):
            return self
        pixels = self.raw_BCHW.contiguous().numpy()
        hashes = [hashlib.blake2b(image, digest_size=8).digest() for image in pixels]
        ranks_B = torch.tensor(sorted(range(len(self)), key=hashes.__getitem__)).argsort()
        chosen = []
        for label, share in zip(*class_shares(self.labels_B, count), strict=True):
            indices_B = (self.labels_B == label).nonzero().flatten()
            chosen.append(indices_B[ranks_B[indices_B].argsort()[:share]])
        return self.take(torch.cat(chosen).sort().values)


def normalise(raw_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn bytes into what the model reads: ``(raw / 255 - mean) / std``, float32.

    Gray images take the average of the three channels' mean and std.
    """
    scale_C, shift_C = map(torch.from_numpy, channel_scale(mean, std, raw_BCHW.shape[1]))
    device = raw_BCHW.device
    return raw_BCHW * scale_C.to(device).view(-1, 1, 1) + shift_C.to(device).view(-1, 1, 1)
