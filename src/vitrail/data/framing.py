"""Pictures of any kind and size -> arrays of the model's size: which part, and which filter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from vitrail.config.settings import DataConfig, FitMode
from vitrail.data.formats import WHITE, Color
from vitrail.data.pictures import Pictures, PixelRange, list_pictures, read_picture

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Framing:
    """Which part of a picture the model sees, and how that part is resized."""

    fit: FitMode = "crop"
    """Largest part of the model's aspect ratio (crop), all on black (pad), or stretched."""
    interpolation: str = "bilinear"
    """The filter, as Pillow names it. All of them are antialiased."""
    crop_pct: float = 1.0
    """Fraction of each side of that part that is kept, around its center; only 1 with pad."""

    @classmethod
    def of(cls, fit: "Fit") -> "Framing":
        """Return a framing as it is, or the default framing with this ``fit``."""
        return fit if isinstance(fit, Framing) else cls(fit)

    @property
    def resampling(self) -> Image.Resampling:
        """The filter as Pillow's constant."""
        return Image.Resampling[self.interpolation.upper()]


Fit = FitMode | Framing
"""A framing; a word stands for the default framing with this ``fit``."""


def framing(config: DataConfig) -> Framing:
    """Return the framing of a run's pictures."""
    return Framing(config.fit, config.interpolation, config.crop_pct)


def stack_pictures(
    pictures: Pictures,
    size_hw: Size,
    n_channels: int,
    fit: Fit,
    *,
    pixel_range: PixelRange | None = None,
    background: Color = WHITE,
) -> np.ndarray:
    """Turn pictures of any kind and size into one array of bytes of the model's size (B, H, W, C).

    Raises:
        PictureError: a picture cannot be read, or is of an unsupported kind.
    """
    listed, side = list_pictures(pictures), enough_side(size_hw, fit)
    raw_BHWC = np.empty((len(listed), *size_hw, n_channels), np.uint8)
    for number, picture in enumerate(listed):
        rgb_HWC = read_picture(
            picture,
            name="the picture" if len(listed) == 1 else f"pictures[{number}]",
            pixel_range=pixel_range,
            background=background,
            shorter_side=side,
        )
        raw_BHWC[number] = fit_channels(rgb_HWC, size_hw, fit, n_channels)
    return raw_BHWC


def fit_picture(rgb_HWC: np.ndarray, size_hw: Size, fit: Fit) -> np.ndarray:
    """Return the picture at a size: center-cropped, padded with black, or stretched.

    Pillow's resizing is antialiased.
    """
    framing, (height, width) = Framing.of(fit), size_hw
    if rgb_HWC.shape[:2] == size_hw and framing.crop_pct == 1:
        return rgb_HWC
    image = Image.fromarray(rgb_HWC)
    if framing.fit == "pad":
        return np.array(ImageOps.pad(image, (width, height), framing.resampling, color=(0, 0, 0)))
    box = seen_box((image.height, image.width), size_hw, fit)
    return np.array(image.resize((width, height), framing.resampling, box))


def fit_channels(rgb_HWC: np.ndarray, size_hw: Size, fit: Fit, n_channels: int) -> np.ndarray:
    """Return RGB bytes of any size at the model's size and channels: (H, W, C), C 3 or 1."""
    raw_HWC = fit_picture(rgb_HWC, size_hw, fit)
    if n_channels == 3:
        return raw_HWC
    return np.asarray(Image.fromarray(raw_HWC).convert("L"))[:, :, None]


def enough_side(size_hw: Size, fit: Fit) -> int | None:
    """Return the shorter side from which a JPEG decoded at reduced size is as good as the original.

    That is four times the model's size: pixels differ by at most 2 of 255 levels on photographs
    and 4 on white noise, and decoding 12 megapixels for 96 pixels is eight times as fast. None for
    nearest-neighbor resizing, which does not average pixels.
    """
    framing = Framing.of(fit)
    if framing.interpolation == "nearest":
        return None
    return math.ceil(4 * max(size_hw) / framing.crop_pct)


def channel_scale(
    mean: Sequence[float], std: Sequence[float], n_channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and shift (C,), float32, that normalize bytes: ``raw * scale + shift``.

    That equals ``(raw / 255 - mean) / std``. Gray pictures use the average of the three channels'
    mean and std.
    """
    mean_C, std_C = np.array(mean, np.float32), np.array(std, np.float32)
    if n_channels == 1:
        mean_C, std_C = mean_C.mean(keepdims=True), std_C.mean(keepdims=True)
    return 1 / (255 * std_C), -mean_C / std_C


def seen_box(
    picture_hw: tuple[int, int], size_hw: tuple[int, int], fit: Fit
) -> tuple[float, float, float, float]:
    """Return the box (left, top, right, bottom), in a picture's pixels, that ``fit_picture`` shows.

    For crop it lies inside the picture, for pad it extends beyond it.
    """
    (height, width), (rows, columns), framing = picture_hw, size_hw, Framing.of(fit)
    if framing.fit != "pad":
        seen_width, seen_height = float(width), float(height)
        if framing.fit == "crop":
            scale = min(width / columns, height / rows)
            seen_width, seen_height = scale * columns, scale * rows
        left = max(0.0, (width - seen_width * framing.crop_pct) / 2)
        top = max(0.0, (height - seen_height * framing.crop_pct) / 2)
        return left, top, width - left, height - top
    if picture_hw == size_hw:
        return 0.0, 0.0, float(width), float(height)
    # Pillow rounds the padded picture's size and position to whole pixels of the result.
    inner_rows, inner_columns = rows, columns
    if width / height > columns / rows:
        inner_rows = max(1, round(height / width * columns))
    else:
        inner_columns = max(1, round(width / height * rows))
    left, top = round((columns - inner_columns) * 0.5), round((rows - inner_rows) * 0.5)
    x_scale, y_scale = width / inner_columns, height / inner_rows
    return -left * x_scale, -top * y_scale, (columns - left) * x_scale, (rows - top) * y_scale
