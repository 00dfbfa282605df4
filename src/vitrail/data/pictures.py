"""A picture in any form that Python code holds it in -> RGB bytes -> the model's size.

Files, their content and Pillow images are decoded by ``formats.py``. Arrays and tensors are
accepted if their numbers are unambiguous: uint8 (0 to 255), bool, or floating-point from 0 to 1.
No torch is imported here.
"""

import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, TypeGuard, cast

import numpy as np
from PIL import Image, ImageOps

from vitrail.config.settings import DataConfig, FitMode
from vitrail.data import formats
from vitrail.data.formats import BYTES, WHITE, Color, PixelRange, Source, gray_to_rgb
from vitrail.errors import PictureError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("vitrail")


Picture: TypeAlias = "Source | np.ndarray | Tensor"
"""A file name, the content of a file, an open file, a Pillow image, or an array."""
Pictures: TypeAlias = "Picture | Iterable[Picture]"
"""One picture, several, or an array of several: (B, H, W, C) or (B, C, H, W)."""
RULE = (
    "give a file name, bytes, a file open in binary mode, a Pillow image, or an array of uint8, "
    "bool or floating-point numbers from 0 to 1"
)
SHAPES = "give (H, W), (H, W, C) or (C, H, W), with C 1, 3 or 4; several pictures as (B, H, W, C)"
CHANNELS = (1, 3, 4)
Size = tuple[int, int]
"""Height and width in pixels."""

guesses: list[str] = []
"""The first message about a guessed range; for a folder of such pictures one line is enough."""


def read_picture(
    picture: Picture,
    *,
    background: Color = WHITE,
    pixel_range: PixelRange | None = None,
    shorter_side: int | None = None,
    name: str = "the picture",
) -> np.ndarray:
    """Return one picture as RGB bytes (H, W, 3), upright, its first frame, over ``background``.

    Gray, palette, 1-bit, CMYK, alpha, 16-bit and floating-point pictures are converted to RGB.

    Args:
        picture: the picture.
        background: red, green, blue behind transparent pixels.
        pixel_range: the values of black and white in 16-bit and floating-point files, and in
            arrays of types other than uint8 and bool. Default: for a file, inferred from its
            values (see ``choose_range``) and logged once; for an array, 0 to 1.
        shorter_side: decode a JPEG file at half, a quarter or an eighth of its size, as long as
            its shorter side keeps this many pixels. Default: at full size.
        name: the name in messages of a picture that is not a file with a name.

    Raises:
        PictureError: it cannot be read, is not exactly one picture, or has more than
            MAX_PIXELS pixels. A larger JPEG is reduced instead.
    """
    if _is_source(picture):
        name = source_name(picture) or name
        try:
            pixels = formats.read_pixels(picture, background=background, shorter_side=shorter_side)
        except PictureError as error:
            raise PictureError(f"{name}: {error}") from error
        if pixels.ndim == 3:
            return pixels
        return gray_to_rgb(formats.to_bytes(pixels, pixel_range or _guess_range(pixels, name)))
    array = as_array(picture, name)
    if array is None:
        raise PictureError(f"{name} is a {type(picture).__name__}: {RULE}")
    raw = _bytes_of(_channels_last(array, name), name, pixel_range)
    if raw.ndim == 3 and raw.shape[2] == 4:
        return read_picture(Image.fromarray(raw), name=name, background=background)
    if raw.ndim == 3 and raw.shape[2] == 3:
        return raw
    return gray_to_rgb(raw.reshape(raw.shape[:2]))


def list_pictures(pictures: Pictures) -> Sequence[Picture]:
    """Return one picture, several, or an array of several as a list."""
    if _is_source(pictures):
        return [pictures]
    array = as_array(pictures, "the picture")
    if array is not None:
        return list(array) if array.ndim == 4 else [array]
    if isinstance(pictures, Iterable) and not isinstance(pictures, Mapping):
        return list(cast(Iterable[Picture], pictures))
    raise PictureError(f"the picture is a {type(pictures).__name__}: {RULE}")


def only_picture(picture: Picture) -> Picture:
    """Return a picture that can be read twice (for an open file, its content); refuse several."""
    listed = list_pictures(picture)
    if len(listed) != 1:
        raise PictureError(f"{len(listed)} pictures are given: give one")
    if not _is_open_file(listed[0]):
        return listed[0]
    try:
        return formats.open_file(listed[0]).read()
    except PictureError as error:
        raise PictureError(f"{source_name(listed[0]) or 'the picture'}: {error}") from error


def source_name(source: object) -> str:
    """Return the name of a picture's file; empty if it has none."""
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
    return str(name) if isinstance(name, str | os.PathLike) else ""


def _is_source(picture: object) -> TypeGuard[Source]:
    """Return whether this is a file, the content of one, or a Pillow image."""
    known = isinstance(picture, str | os.PathLike | BYTES | Image.Image)
    return known or _is_open_file(picture)


def _is_open_file(picture: object) -> TypeGuard[BinaryIO]:
    """Return whether this is an open file, or one in memory."""
    return hasattr(picture, "read")


def as_array(picture: object, name: str) -> np.ndarray | None:
    """Return an array or tensor of any library as a NumPy array, None for anything else."""
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    try:
        if torch is not None and isinstance(picture, torch.Tensor):
            tensor = picture.detach().cpu()  # NumPy has no bfloat16
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            return cast(np.ndarray, tensor.numpy())
        return np.asarray(picture) if hasattr(picture, "__array__") else None
    except (TypeError, ValueError, RuntimeError) as error:  # sparse, quantized, on another device
        kind = type(picture).__name__
        raise PictureError(f"{name} is a {kind} that NumPy cannot read: {RULE}") from error


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array as (H, W) or (H, W, C), or refuse a shape that is neither or both."""
    if 0 in array.shape:
        raise PictureError(f"{name} has no pixels: its shape is {array.shape}")
    if array.ndim == 2:
        return array
    last = array.ndim == 3 and array.shape[2] in CHANNELS
    first = array.ndim == 3 and array.shape[0] in CHANNELS
    if last and first:
        raise PictureError(
            f"{name} has the shape {array.shape}, which could be (H, W, C) or (C, H, W): "
            "give a Pillow image, Image.fromarray(array)"
        )
    if not last and not first:
        raise PictureError(f"{name} has the shape {array.shape}: {SHAPES}")
    return array if last else array.transpose(1, 2, 0)


def _bytes_of(array: np.ndarray, name: str, pixel_range: PixelRange | None) -> np.ndarray:
    """Return the numbers as bytes, or refuse them if their meaning is ambiguous."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind in "iuf" and pixel_range and pixel_range != (0.0, 1.0):
        return formats.to_bytes(array, pixel_range)
    if array.dtype.kind != "f":
        raise PictureError(f"{name} is an array of {array.dtype}: {RULE}")
    scaled = np.rint(array.astype(np.float32) * 255)  # values that round to a byte are fine
    low, high = float(scaled.min()), float(scaled.max())
    if not (low >= 0 and high <= 255):  # NaN, too
        raise PictureError(
            f"{name} has floating-point numbers from {array.min():.4g} to {array.max():.4g}: give "
            "numbers from 0 to 1, or uint8 from 0 to 255"
        )
    return scaled.astype(np.uint8)


def _guess_range(values_HW: np.ndarray, name: str) -> PixelRange:
    """Return the range of a single wide gray picture; the first guess of a process is logged."""
    extent = formats.measure(values_HW)
    pixel_range = formats.choose_range(extent)
    if not guesses:
        guesses.append(
            f"{name}: a single wide gray picture: {formats.describe(extent, pixel_range)}"
        )
        log.warning("%s", guesses[0])
    return pixel_range


@dataclass(frozen=True)
class Framing:
    """Which part of a picture the model sees, and how that part is resized."""

    fit: FitMode = "crop"
    """Largest part with the model's aspect ratio (crop), all on black (pad), or all stretched."""
    interpolation: str = "bilinear"
    """The filter, as Pillow names it. All of them are antialiased."""
    crop_pct: float = 1.0
    """Fraction of each side of that part that is kept, around its center; only 1 with pad."""

    @classmethod
    def of(cls, fit: "Fit") -> "Framing":
        """Return a framing as it is, or the default framing with this ``fit``."""
        return fit if isinstance(fit, Framing) else cls(fit)


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
    """Turn pictures of any kind and size into bytes of the model's size (B, H, W, C)."""
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
    """Return a picture, RGB or gray (H, W), at a size: cropped, padded with black, or stretched."""
    framing, (height, width) = Framing.of(fit), size_hw
    if rgb_HWC.shape[:2] == size_hw and framing.crop_pct == 1:
        return rgb_HWC
    image = Image.fromarray(rgb_HWC)
    resampling = Image.Resampling[framing.interpolation.upper()]
    if framing.fit == "pad":
        return np.array(ImageOps.pad(image, (width, height), resampling, color=0))
    box = seen_box((image.height, image.width), size_hw, fit)
    return np.array(image.resize((width, height), resampling, box))


def fit_channels(rgb_HWC: np.ndarray, size_hw: Size, fit: Fit, n_channels: int) -> np.ndarray:
    """Return RGB bytes of any size at the model's size and channels: (H, W, C), C 3 or 1."""
    raw_HWC = fit_picture(rgb_HWC, size_hw, fit)
    if n_channels == 3:
        return raw_HWC
    return np.asarray(Image.fromarray(raw_HWC).convert("L"))[:, :, None]


def enough_side(size_hw: Size, fit: Fit) -> int | None:
    """Return the shorter side at which a JPEG decoded at reduced size is as good as the original.

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


def seen_box(picture_hw: Size, size_hw: Size, fit: Fit) -> tuple[float, float, float, float]:
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
