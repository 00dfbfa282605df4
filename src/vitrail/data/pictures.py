"""Any picture that Pillow can read -> RGB bytes of any size -> the model's size."""

import functools
import glob
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vitrail.data.formats import (
    BROKEN,
    WHITE,
    Color,
    Source,
    is_heif,
    quiet,
    read_pixels,
    register_heif,
)
from vitrail.data.framing import Fit as Fit
from vitrail.data.framing import Framing
from vitrail.data.walk import is_hidden, walk_files
from vitrail.data.wide import PixelRange, choose_range, describe, measure, to_bytes
from vitrail.errors import PictureError

log = logging.getLogger("vitrail")

Size = tuple[int, int]
"""Height and width in pixels."""
SUFFIXES = frozenset((
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".icb", ".ico", ".j2c", ".j2k", ".jfif",
    ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png",
    ".pnm", ".ppm", ".psd", ".qoi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp",
))  # fmt: skip
"""Endings that count as pictures when a folder is searched, whatever the content."""
HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))
"""Endings that do so where pillow-heif is installed."""
SIGNED = (
    "AVIF", "BLP", "BMP", "DDS", "FITS", "FTEX", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MSP",
    "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TIFF", "WEBP", "XBM", "XPM",
)  # fmt: skip
"""Formats that Pillow knows by their first bytes: files of these may have any ending, or none."""


def read_picture(
    source: Source,
    *,
    background: Color = WHITE,
    pixel_range: PixelRange | None = None,
    shorter_side: int | None = None,
    name: str = "the picture",
) -> np.ndarray:
    """Return the picture as RGB bytes (H, W, 3), upright, its first frame, over ``background``.

    Gray, palette, 1-bit, CMYK, alpha, 16-bit and floating-point pictures all become RGB.

    Args:
        source: a file's name, its content, the open file, or a Pillow image.
        background: red, green, blue behind transparent pixels.
        pixel_range: the values of black and white in 16-bit and floating-point pictures. Default:
            from the values of this picture, see ``wide.choose_range``; that is logged once.
        shorter_side: decode a JPEG file at half, a quarter or an eighth of its size, as long as
            its shorter side keeps this many pixels. Default: at full size.
        name: what it is called in messages, if it is not a file with a name.

    Raises:
        PictureError: it is not a picture, is damaged, or has more than MAX_PIXELS pixels. A larger
            JPEG is reduced instead.
    """
    name = source_name(source) or name
    try:
        pixels = read_pixels(source, background=background, shorter_side=shorter_side)
    except PictureError as error:
        raise PictureError(f"{name}: {error}") from error
    if pixels.ndim == 3:
        return pixels
    if pixel_range is None:
        extent = measure(pixels)
        pixel_range = choose_range(extent)
        warn_once(f"{name}: a wide gray picture by itself: {describe(extent, pixel_range)}")
    return gray_to_rgb(to_bytes(pixels, pixel_range))


def source_name(source: object) -> str:
    """Return the name of a picture's file; empty if it has none."""
    name = source if isinstance(source, str | os.PathLike) else getattr(source, "name", "")
    return str(name) if isinstance(name, str | os.PathLike) else ""


def gray_to_rgb(gray_HW: np.ndarray) -> np.ndarray:
    """Return gray bytes as RGB bytes (H, W, 3)."""
    return np.repeat(gray_HW[:, :, None], 3, axis=2)


def warn_once(message: str) -> None:
    """Report the first range that was guessed; in a folder of such pictures one line is enough."""
    if not guesses:
        guesses.append(message)
        log.warning("%s", message)


guesses: list[str] = []


def fit_picture(rgb_HWC: np.ndarray, size_hw: Size, fit: Fit) -> np.ndarray:
    """Return the picture at a size: its middle (crop), all of it on black (pad), or stretched.

    Scaling is antialiased, as Pillow does it.
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
    """Return RGB bytes of any size as a model reads them: (H, W, C) of its size, C 3 or 1."""
    raw_HWC = fit_picture(rgb_HWC, size_hw, fit)
    if n_channels == 3:
        return raw_HWC
    return np.asarray(Image.fromarray(raw_HWC).convert("L"))[:, :, None]


def enough_side(size_hw: Size, fit: Fit) -> int | None:
    """Return the shorter side from which a reduced JPEG is as good as the whole one.

    Four times the size wanted of the whole picture: a pixel is at most 2 of 255 levels away on
    photographs and 4 on white noise. From 12 megapixels to 96 pixels it is eight times as fast.
    None for the nearest pixel, which is not an average of its neighbors.
    """
    framing = Framing.of(fit)
    if framing.interpolation == "nearest":
        return None
    return math.ceil(4 * max(size_hw) / framing.crop_pct)


def channel_scale(
    mean: Sequence[float], std: Sequence[float], n_channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and shift (C,), float32, that normalise bytes: ``raw * scale + shift``.

    That is ``(raw / 255 - mean) / std``. Gray pictures take the average of the three channels' mean
    and std.
    """
    mean_C, std_C = np.array(mean, np.float32), np.array(std, np.float32)
    if n_channels == 1:
        mean_C, std_C = mean_C.mean(keepdims=True), std_C.mean(keepdims=True)
    return 1 / (255 * std_C), -mean_C / std_C


def seen_box(
    picture_hw: tuple[int, int], size_hw: tuple[int, int], fit: Fit
) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom, in a picture's pixels, of what ``fit_picture`` makes of it.

    Cropping makes a box inside the picture, padding one that reaches beyond it.
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
    # Pillow rounds the padded picture's size and place to whole pixels of the model's.
    inner_rows, inner_columns = rows, columns
    if width / height > columns / rows:
        inner_rows = max(1, round(height / width * columns))
    else:
        inner_columns = max(1, round(width / height * rows))
    left, top = round((columns - inner_columns) * 0.5), round((rows - inner_rows) * 0.5)
    x_scale, y_scale = width / inner_columns, height / inner_rows
    return -left * x_scale, -top * y_scale, (columns - left) * x_scale, (rows - top) * y_scale


def is_picture(path: Path) -> bool:
    """Return whether a file counts as a picture when a folder is searched; hidden files do not.

    A usual ending is enough, so that this is fast; any other file is identified by its content.
    """
    if is_hidden(path.name):
        return False
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return path.is_file()
    if suffix in HEIF_SUFFIXES:
        return path.is_file() and register_heif()
    return has_picture_content(path)


def has_picture_content(path: Path) -> bool:
    """Return whether a file begins as one of the formats in SIGNED does, or as HEIC."""
    head = read_head(path)
    if is_heif(head):
        return register_heif()
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return True
    try:
        with quiet, Image.open(path, formats=signed_formats()):
            return True
    except Image.DecompressionBombError:
        return True
    except BROKEN:
        return False


@functools.cache
def signed_formats() -> tuple[str, ...]:
    """Return those of SIGNED that this version of Pillow has."""
    Image.init()
    return tuple(name for name in SIGNED if name in Image.OPEN)


def read_head(path: Path) -> bytes:
    """Return the first 16 bytes of a file; none of what cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError:
        return b""


def left_out_reason(path: Path) -> str:
    """Return the kind of a file that was not taken as a picture, or could not be read as one.

    For example ``.mp4``, ``no ending``, ``.heic (install pillow-heif)`` or ``broken``.
    """
    ending = path.suffix.lower() or "no ending"
    heif = path.suffix.lower() in HEIF_SUFFIXES or is_heif(read_head(path))
    if heif and not register_heif():
        return f"{ending} (install pillow-heif)"
    return "broken" if is_picture(path) else ending


def find_pictures(words: Sequence[str]) -> list[Path]:
    """Return the picture files that words stand for: a file, a folder with all below it, a glob.

    Raises:
        PictureError: a word stands for nothing.
        DataError: a folder cannot be read.
    """
    found: list[Path] = []
    for word in words:
        try:
            paths = find_word(word)
        except OSError as error:  # a name too long, a folder that may not be entered
            raise PictureError(f"{word:.200}: {error.strerror}") from error
        if not paths:
            nothing = nothing_in(Path(word)) if Path(word).is_dir() else "no such picture"
            raise PictureError(f"{word}: {nothing}")
        found += paths
    return found


def find_word(word: str) -> list[Path]:
    """Return the files that one word stands for."""
    path = Path(word)
    if path.is_dir():
        return [inner for inner in walk_files(path) if is_picture(inner)]
    if path.exists():
        return [path]
    matches = map(Path, glob.glob(word, recursive=True))  # noqa: PTH207 (absolute and relative alike)
    return sorted(match for match in matches if match.is_file())


def nothing_in(folder: Path) -> str:
    """Say that a folder has no picture, and what it has instead."""
    kinds = Counter(map(left_out_reason, walk_files(folder)))
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    return f"no picture in this folder{f', only {counts}' if counts else ''}"
