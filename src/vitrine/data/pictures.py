"""Any picture that Pillow can read -> RGB bytes of any size -> the model's size."""

import glob
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitrine.errors import PictureError

Fit = Literal["crop", "pad", "squash"]
Picture = str | Path | bytes | Image.Image | np.ndarray
"""A file's name or content, a Pillow image, or an array (H, W, 3) of uint8."""

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: 300 MB of RGB is enough."""
MAX_SCANNED = 20 * MAX_PIXELS
"""A JPEG is decoded once a scan: so many pixels of all scans together are enough."""
SUFFIXES = frozenset((
    ".apng", ".avif", ".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm",
    ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))  # fmt: skip
"""Endings that count as pictures when a folder is searched."""
REFUSED = frozenset(("EPS", "IPTC", "WMF"))
"""Formats that Pillow hands to another program to draw, or that may hold one of these."""
BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError,
          AttributeError, MemoryError, OverflowError, RuntimeError, struct.error,
          zlib.error)  # fmt: skip
"""What Pillow's decoders raise on damaged files, besides their own UnidentifiedImageError."""


class Quiet:
    """Silences Pillow's warnings of odd metadata and sizes, in any number of threads at once.

    ``catch_warnings`` swaps a list that all threads share, so overlapping uses would restore it in
    the wrong order: here the first to come swaps it and the last to go swaps it back.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.filters = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.filters = warnings.catch_warnings()
                self.filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.filters.__exit__(None, None, None)


quiet = Quiet()


def read_picture(
    source: str | Path | bytes | Image.Image, *, background: tuple[int, int, int] = (255, 255, 255)
) -> np.ndarray:
    """Return the picture as RGB bytes (H, W, 3), upright, its first frame, over ``background``.

    Gray, palette, 1-bit, CMYK, alpha, 16-bit and floating-point pictures all become RGB; how wide
    values are brought to bytes is told at ``scale_to_bytes``.

    Raises:
        PictureError: it is not a picture, is damaged, or has more than MAX_PIXELS pixels.
    """
    name = "the picture" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        with quiet:
            if isinstance(source, Image.Image):
                return to_rgb(source, name, background)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return to_rgb(image, name, background)
    except UnidentifiedImageError as error:
        raise PictureError(f"{name}: not a picture that can be read") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: too large: more than {MAX_PIXELS:,} pixels") from error
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"{name}: cannot be read: {reason.splitlines()[0]:.100}") from error


def to_rgb(image: Image.Image, name: str, background: tuple[int, int, int]) -> np.ndarray:
    """Return an opened picture as RGB bytes."""
    if image.format in REFUSED:
        raise PictureError(f"{name}: {image.format} is a program that draws, not a picture")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}: scale it")
    if width * height == 0:
        raise PictureError(f"{name}: it has no pixels")
    file = getattr(image, "fp", None)
    if image.format in ("JPEG", "MPO") and file is not None:
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        if width * height * scans > MAX_SCANNED:
            raise PictureError(f"{name}: its {width} x {height} pixels come in {scans} scans")
    if getattr(image, "is_animated", False):
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(scale_to_bytes(np.asarray(image))[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def scale_to_bytes(values_HW: np.ndarray) -> np.ndarray:
    """Scale gray values that are wider than bytes.

    Whole numbers count to 65,535; floating-point ones to 1, 255 or 65,535, whichever is the first
    to hold them all. Values that none of these holds run from their own lowest to their highest.
    What is not finite counts as 0.
    """
    # Some rows at a time: a large picture in double precision would take gigabytes.
    parts = np.array_split(values_HW, 1 + values_HW.size // 1_000_000)
    ends = [(part.min(), part.max()) for part in map(widen, parts) if part.size]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    for top in (1.0, 255.0, 65_535.0) if values_HW.dtype.kind == "f" else (65_535.0,):
        if low >= 0 and high <= top:
            low, high = 0.0, top
            break
    factor = 255 / (high - low or 1.0)
    scaled = [((widen(part) - low) * factor).round() for part in parts]
    return np.concatenate([part.astype(np.uint8) for part in scaled])


def widen(values_HW: np.ndarray) -> np.ndarray:
    """Return values in double precision, 0 for what is not finite."""
    with np.errstate(invalid="ignore"):  # NumPy warns of some NaN, which damaged files hold
        return np.nan_to_num(values_HW.astype(np.float64), posinf=0.0, neginf=0.0)


def fit_picture(rgb_HWC: np.ndarray, size_hw: tuple[int, int], fit: Fit) -> np.ndarray:
    """Return the picture at a size: its middle (crop), all of it on black (pad), or stretched.

    Scaling is bilinear with antialiasing, as Pillow does it.
    """
    height, width = size_hw
    if rgb_HWC.shape[:2] == size_hw:
        return rgb_HWC
    image, resampling = Image.fromarray(rgb_HWC), Image.Resampling.BILINEAR
    if fit == "crop":
        return np.array(ImageOps.fit(image, (width, height), resampling))
    if fit == "pad":
        return np.array(ImageOps.pad(image, (width, height), resampling, color=(0, 0, 0)))
    return np.array(image.resize((width, height), resampling))


def stack_pictures(
    pictures: Picture | Sequence[Picture], size_hw: tuple[int, int], n_channels: int, fit: Fit
) -> np.ndarray:
    """Turn pictures of any kind and size into one array of bytes of the model's size (B, H, W, C).

    Raises:
        PictureError: a picture cannot be read.
    """
    if isinstance(pictures, str | Path | bytes | Image.Image | np.ndarray):
        pictures = [pictures]
    raws = []
    for picture in pictures:
        rgb_HWC = picture if isinstance(picture, np.ndarray) else read_picture(picture)
        raw_HWC = fit_picture(rgb_HWC, size_hw, fit)
        gray_HW = Image.fromarray(raw_HWC).convert("L") if n_channels == 1 else None
        raws.append(raw_HWC if gray_HW is None else np.asarray(gray_HW)[:, :, None])
    return np.stack(raws) if raws else np.zeros((0, *size_hw, n_channels), np.uint8)


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
    (height, width), (rows, columns) = picture_hw, size_hw
    if fit == "squash" or picture_hw == size_hw:
        return 0.0, 0.0, float(width), float(height)
    if fit == "crop":
        scale = min(width / columns, height / rows)
        left, top = (width - scale * columns) / 2, (height - scale * rows) / 2
        return left, top, width - left, height - top
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
    """Tell whether a file's name is a picture's; hidden files are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def find_pictures(words: Sequence[str]) -> list[Path]:
    """Return the picture files that words stand for: a file, a folder with all below it, a glob.

    Raises:
        PictureError: a word stands for nothing.
    """
    found: list[Path] = []
    for word in words:
        try:
            paths = find_word(word)
        except OSError as error:  # a name too long, a folder that may not be entered
            raise PictureError(f"{word:.200}: {error.strerror}") from error
        if not paths:
            kind = "no picture in this folder" if Path(word).is_dir() else "no such picture"
            raise PictureError(f"{word}: {kind}")
        found += paths
    return found


def find_word(word: str) -> list[Path]:
    """Return the files that one word stands for."""
    path = Path(word)
    if path.is_dir():
        return sorted(inner for inner in path.rglob("*") if is_picture(inner))
    if path.exists():
        return [path]
    matches = map(Path, glob.glob(word, recursive=True))  # noqa: PTH207 (absolute and relative alike)
    return sorted(match for match in matches if match.is_file())
