"""A picture in any form that Python code holds it in -> RGB bytes. No torch is imported here.

Files, their content and Pillow images are decoded by ``formats.py``. Arrays and tensors are
accepted if their numbers have only one meaning: uint8 (0 to 255), bool, or floating-point from 0
to 1.

Wide gray values (16-bit, 32-bit, floating-point) have a range: the value that becomes black (0) and
the value that becomes white (255). Nothing in such a file says which values are meant, so the range
is inferred from the lowest and highest value of all pictures of a data set, by ``choose_range``.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeGuard, cast

import numpy as np
from PIL import Image

from vitrail.data.formats import BYTES, WHITE, Color, Source, open_file, read_pixels
from vitrail.errors import PictureError

log = logging.getLogger("vitrail")


class ArrayLike(Protocol):
    """A NumPy array, a torch tensor, or another library's array."""

    @property
    def shape(self) -> Any:
        """The lengths of its axes."""

    @property
    def dtype(self) -> Any:
        """The type of its numbers."""


Picture = Source | ArrayLike
"""A file name, the content of a file, an open file, a Pillow image, or an array."""
Pictures = Picture | Iterable[Picture]
"""One picture, several, or an array of several: (B, H, W, C) or (B, C, H, W)."""
PixelRange = tuple[float, float]
"""The values that become 0 and 255."""

RULE = (
    "give a file name, bytes, a file open in binary mode, a Pillow image, or an array of uint8, "
    "bool or floating-point numbers from 0 to 1"
)
SHAPES = "give (H, W), (H, W, C) or (C, H, W), with C 1, 3 or 4; several pictures as (B, H, W, C)"
CHANNELS = (1, 3, 4)
INTEGER_TOPS = (255.0, 1023.0, 4095.0, 16_383.0, 65_535.0)
"""Highest values of 8, 10, 12, 14 and 16 bits."""
OVERSHOOT = 0.25
"""Floating-point values from -0.25 to 1.25 count as 0..1 and are clipped: bicubic scaling of 0..1
overshoots by up to 0.235 at a corner (OpenCV's kernel, 1.111 squared; Pillow's less).
"""
LEAST_USED = 1 / 8
"""A warning is logged if less of the range is used: pictures of 32 gray levels or fewer."""

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
        pixel_range: the values of black and white in 16-bit and floating-point files. Default:
            inferred from the values of this picture (see ``choose_range``) and logged once.
        shorter_side: decode a JPEG file at half, a quarter or an eighth of its size, as long as
            its shorter side keeps this many pixels. Default: at full size.
        name: the name in messages of a picture that is not a file with a name.

    Raises:
        PictureError: it cannot be read, is not a picture or more than one, or has more than
            MAX_PIXELS pixels. A larger JPEG is reduced instead.
    """
    if _is_source(picture):
        name = source_name(picture) or name
        try:
            pixels = read_pixels(picture, background=background, shorter_side=shorter_side)
        except PictureError as error:
            raise PictureError(f"{name}: {error}") from error
        if pixels.ndim == 3:
            return pixels
        return gray_to_rgb(to_bytes(pixels, pixel_range or _guess_range(pixels, name)))
    array = _as_array(picture, name)
    if array is None:
        raise PictureError(f"{name} is a {type(picture).__name__}: {RULE}")
    raw = _bytes_of(_channels_last(array, name), name)
    if raw.ndim == 3 and raw.shape[2] == 4:
        return read_picture(Image.fromarray(raw), name=name, background=background)
    if raw.ndim == 3 and raw.shape[2] == 3:
        return raw
    return gray_to_rgb(raw.reshape(raw.shape[:2]))


def list_pictures(pictures: Pictures) -> Sequence[Picture]:
    """Return one picture, several, or an array of several as a list."""
    if _is_source(pictures):
        return [pictures]
    array = _as_array(pictures, "the picture")
    if array is not None:
        return list(array) if array.ndim == 4 else [array]
    if isinstance(pictures, Iterable) and not isinstance(pictures, Mapping):
        return list(cast(Iterable[Picture], pictures))
    raise PictureError(f"the picture is a {type(pictures).__name__}: {RULE}")


def only_picture(picture: Picture) -> Picture:
    """Return a picture that can be read twice: the content of a file that is open.

    Raises:
        PictureError: it is several pictures.
    """
    listed = list_pictures(picture)
    if len(listed) != 1:
        raise PictureError(f"{len(listed)} pictures are given: give one")
    return open_file(listed[0]).read() if _is_open_file(listed[0]) else listed[0]


def source_name(source: object) -> str:
    """Return the name of a picture's file; empty if it has none."""
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
    return str(name) if isinstance(name, str | os.PathLike) else ""


def gray_to_rgb(gray_HW: np.ndarray) -> np.ndarray:
    """Return gray bytes as RGB bytes (H, W, 3)."""
    return np.repeat(gray_HW[:, :, None], 3, axis=2)


def _is_source(picture: object) -> TypeGuard[Source]:
    """Return whether this is a file, the content of one, or a Pillow image."""
    known = isinstance(picture, str | os.PathLike | BYTES | Image.Image)
    return known or _is_open_file(picture)


def _is_open_file(picture: object) -> TypeGuard[BinaryIO]:
    """Return whether this is an open file, or one in memory."""
    return hasattr(picture, "read")


def _as_array(picture: object, name: str) -> np.ndarray | None:
    """Return an array or tensor of any library as a NumPy array, None for anything else."""
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    try:
        if torch is not None and isinstance(picture, torch.Tensor):
            tensor = picture.detach().cpu()  # NumPy has no bfloat16
            return cast(
                np.ndarray, (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            )
        return np.asarray(picture) if hasattr(picture, "__array__") else None
    except (TypeError, ValueError, RuntimeError) as error:  # sparse, quantized, on another device
        kind = type(picture).__name__
        raise PictureError(f"{name} is a {kind} that NumPy cannot read: {RULE}") from error


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array as (H, W) or (H, W, C), or refuse a shape that is not or could be both."""
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


def _bytes_of(array: np.ndarray, name: str) -> np.ndarray:
    """Return the numbers as bytes, or refuse them if they have no unique meaning."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind != "f":
        raise PictureError(f"{name} is an array of {array.dtype}: {RULE}")
    scaled = np.rint(array.astype(np.float32) * 255)  # what rounds to a byte is one
    low, high = float(scaled.min()), float(scaled.max())
    if not (low >= 0 and high <= 255):  # NaN, too
        raise PictureError(
            f"{name} has floating-point numbers from {array.min():.4g} to {array.max():.4g}: give "
            "numbers from 0 to 1, or uint8 from 0 to 255"
        )
    return scaled.astype(np.uint8)


@dataclass(frozen=True)
class Extent:
    """The lowest and highest finite value of some pictures, and whether any is floating-point."""

    low: float
    high: float
    floats: bool


def measure(values_HW: np.ndarray) -> Extent:
    """Return the extent of one picture; 0..0 if none of its values is finite."""
    lows, highs = [], []
    for part in _doubles(values_HW):
        finite = part[np.isfinite(part)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    return Extent(min(lows, default=0.0), max(highs, default=0.0), values_HW.dtype.kind == "f")


def join(extents: Iterable[Extent]) -> Extent:
    """Return the extent of several pictures together."""
    known = list(extents)
    low, high = min(each.low for each in known), max(each.high for each in known)
    return Extent(low, high, any(each.floats for each in known))


def choose_range(extent: Extent) -> PixelRange:
    """Return the most probable range of values with this extent.

    Integers: the first of 8, 10, 12, 14 and 16 bits that holds them all. Floating-point values:
    0..1 (see OVERSHOOT), or else 0..255 or 0..65535 if these hold them and at least an eighth of
    the range is used. Everything else, such as negative values: from the lowest to the highest.
    """
    low, high = extent.low, extent.high
    tops: tuple[float, ...] = INTEGER_TOPS
    if extent.floats:
        if low >= -OVERSHOOT * high and high <= 1 + OVERSHOOT:
            return 0.0, 1.0
        tops = tuple(top for top in (255.0, 65_535.0) if high >= top * LEAST_USED)
    if low >= 0:
        for top in tops:
            if high <= top:
                return 0.0, top
    return low, high


def describe(extent: Extent, pixel_range: PixelRange) -> str:
    """Return a description of the conversion, with a warning if little of the range is used.

    For example ``values 0..4095 read as 0..4095 -> 0..255; --pixel_range sets it``.
    """
    low, high = pixel_range
    used = (min(extent.high, high) - max(extent.low, low)) / ((high - low) or 1.0)
    little = f" (only {max(used, 0.0):.1%} of it is used: dark or pale)"
    return (
        f"values {extent.low:g}..{extent.high:g} read as {low:g}..{high:g} -> 0..255"
        f"{little if used < LEAST_USED else ''}; --pixel_range sets it"
    )


def to_bytes(values_HW: np.ndarray, pixel_range: PixelRange) -> np.ndarray:
    """Return gray bytes (H, W): the range is mapped to 0..255, values outside are clipped.

    Values that are not finite count as 0 before that. A range of one value is mapped to black.
    """
    low, high = pixel_range
    factor = 255 / ((high - low) or 1.0)
    raw, done = np.empty(values_HW.size, np.uint8), 0
    for part in _doubles(values_HW):
        part = np.where(np.isfinite(part), part, 0.0).clip(low, high)
        raw[done : done + part.size] = ((part - low) * factor).round()
        done += part.size
    return raw.reshape(values_HW.shape)


def _guess_range(values_HW: np.ndarray, name: str) -> PixelRange:
    """Return the range of a single wide gray picture; the first guess of a process is logged."""
    extent = measure(values_HW)
    pixel_range = choose_range(extent)
    if not guesses:
        guesses.append(f"{name}: a single wide gray picture: {describe(extent, pixel_range)}")
        log.warning("%s", guesses[0])
    return pixel_range


def _doubles(values_HW: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the values in double precision, a million at a time to save memory."""
    flat = values_HW.reshape(-1)
    for start in range(0, flat.size, 1_000_000):
        with np.errstate(invalid="ignore"):  # NumPy warns of some NaN in corrupt files
            yield flat[start : start + 1_000_000].astype(np.float64)
