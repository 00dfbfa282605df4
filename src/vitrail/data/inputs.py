"""Whatever Python code holds pictures in -> RGB bytes. No torch is imported here.

Files, their content and Pillow images are read by ``pictures.py``. Arrays and tensors are taken if
their numbers have only one meaning: uint8 (0 to 255), bool, or floating-point from 0 to 1.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, Protocol, TypeGuard, cast

import numpy as np
from PIL import Image

from vitrail.data.formats import BYTES, WHITE, Color, Source, open_file
from vitrail.data.pictures import Fit, Size, enough_side, fit_channels, gray_to_rgb, read_picture
from vitrail.data.wide import PixelRange
from vitrail.errors import PictureError


class ArrayLike(Protocol):
    """A NumPy array, a torch tensor, or another library's array."""

    @property
    def shape(self) -> Any:
        """The lengths of its axes."""

    @property
    def dtype(self) -> Any:
        """The type of its numbers."""


Picture = Source | ArrayLike
"""A file's name, its content, the open file, a Pillow image, or an array."""
Pictures = Picture | Iterable[Picture]
"""One picture, several, or an array of several: (B, H, W, C) or (B, C, H, W)."""

RULE = (
    "give a file name, bytes, a file open in binary mode, a Pillow image, or an array of uint8, "
    "bool or floating-point numbers from 0 to 1"
)
SHAPES = "give (H, W), (H, W, C) or (C, H, W), with C 1, 3 or 4; several pictures as (B, H, W, C)"
CHANNELS = (1, 3, 4)


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
        PictureError: a picture cannot be read, or is something that this module does not take.
    """
    listed, side = list_pictures(pictures), enough_side(size_hw, fit)
    raw_BHWC = np.empty((len(listed), *size_hw, n_channels), np.uint8)
    for number, picture in enumerate(listed):
        rgb_HWC = read_one(
            picture,
            name="the picture" if len(listed) == 1 else f"pictures[{number}]",
            pixel_range=pixel_range,
            background=background,
            shorter_side=side,
        )
        raw_BHWC[number] = fit_channels(rgb_HWC, size_hw, fit, n_channels)
    return raw_BHWC


def read_one(
    picture: Picture,
    *,
    name: str = "the picture",
    pixel_range: PixelRange | None = None,
    background: Color = WHITE,
    shorter_side: int | None = None,
) -> np.ndarray:
    """Return one picture of any kind as RGB bytes (H, W, 3).

    Args:
        picture: the picture.
        name: what it is called in messages, if it is not a file with a name.
        pixel_range: see ``read_picture``; of no meaning for arrays.
        background: red, green, blue behind transparent pixels.
        shorter_side: see ``read_picture``.

    Raises:
        PictureError: it cannot be read, is several pictures, or is none.
    """
    if is_source(picture):
        return read_picture(
            picture,
            name=name,
            pixel_range=pixel_range,
            background=background,
            shorter_side=shorter_side,
        )
    array = as_array(picture, name)
    if array is None:
        raise PictureError(f"{name} is a {type(picture).__name__}: {RULE}")
    raw = bytes_of(channels_last(array, name), name)
    if raw.ndim == 2:
        return gray_to_rgb(raw)
    if raw.shape[2] == 4:
        return read_picture(Image.fromarray(raw), name=name, background=background)
    return gray_to_rgb(raw[:, :, 0]) if raw.shape[2] == 1 else raw


def list_pictures(pictures: Pictures) -> Sequence[Picture]:
    """Return one picture, several, or an array of several as a list."""
    if is_source(pictures):
        return [pictures]
    array = as_array(pictures, "the picture")
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
    return open_file(listed[0]).read() if is_open_file(listed[0]) else listed[0]


def is_source(picture: object) -> TypeGuard[Source]:
    """Return whether this is something that ``read_picture`` takes."""
    known = isinstance(picture, str | os.PathLike | BYTES | Image.Image)
    return known or is_open_file(picture)


def is_open_file(picture: object) -> TypeGuard[BinaryIO]:
    """Return whether this is a file that is open, or one in memory."""
    return hasattr(picture, "read")


def as_array(picture: object, name: str) -> np.ndarray | None:
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


def channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array as (H, W) or (H, W, C).

    Raises:
        PictureError: it is of another shape, or it could be of two of them.
    """
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


def bytes_of(array: np.ndarray, name: str) -> np.ndarray:
    """Return the numbers as bytes.

    Raises:
        PictureError: they are neither uint8 nor bool nor floating-point from 0 to 1.
    """
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
