"""Any picture that Pillow can read -> RGB bytes of any size -> the model's size."""

import glob
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitrine.errors import PictureError

Fit = Literal["crop", "pad", "squash"]

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: 300 MB of RGB is enough."""
SUFFIXES = frozenset((
    ".apng", ".avif", ".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm",
    ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp",
))  # fmt: skip
"""Endings that count as pictures when a folder is searched."""
BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError,
          AttributeError, MemoryError, OverflowError, RuntimeError)  # fmt: skip
"""What Pillow's decoders raise on damaged files, besides their own UnidentifiedImageError."""


def read_picture(
    source: str | Path | bytes | Image.Image, *, background: tuple[int, int, int] = (255, 255, 255)
) -> np.ndarray:
    """Return the picture as RGB bytes (H, W, 3), upright, its first frame, over ``background``.

    Gray, palette, 1-bit, CMYK, alpha and 16-bit pictures become RGB; 16-bit and floating-point ones
    are scaled from their full range (65,535; or their own smallest and largest value) to 255.

    Raises:
        PictureError: it is not a picture, is damaged, or has more than MAX_PIXELS pixels.
    """
    name = "the picture" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; the pixels are fine
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
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}: scale it")
    if width * height == 0:
        raise PictureError(f"{name}: it has no pixels")
    image.seek(0) if getattr(image, "is_animated", False) else None
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(scale_to_bytes(np.asarray(image))[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def scale_to_bytes(values_HW: np.ndarray) -> np.ndarray:
    """Scale 16-bit or wider gray values to bytes."""
    wide_HW = np.nan_to_num(values_HW.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = 0.0, 65_535.0
    if values_HW.dtype != np.uint16 and not 255 < wide_HW.max() <= high:
        low, high = wide_HW.min(), wide_HW.max()
    if high <= low:
        return np.full(values_HW.shape, np.uint8(np.clip(low, 0, 255)))
    return (np.clip((wide_HW - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def fit_picture(rgb_HWC: np.ndarray, size_hw: tuple[int, int], fit: Fit) -> np.ndarray:
    """Return the picture at a size: its middle (crop), all of it on black (pad), or stretched.

    Scaling is bilinear with antialiasing, as Pillow does it.
    """
    height, width = size_hw
    if rgb_HWC.shape[:2] == size_hw:
        return rgb_HWC
    image, resampling = Image.fromarray(rgb_HWC), Image.Resampling.BILINEAR
    if fit == "crop":
        return np.asarray(ImageOps.fit(image, (width, height), resampling))
    if fit == "pad":
        return np.asarray(ImageOps.pad(image, (width, height), resampling, color=(0, 0, 0)))
    return np.asarray(image.resize((width, height), resampling))


def find_pictures(words: Sequence[str]) -> list[Path]:
    """Return the picture files that words stand for: a file, a folder with all below it, a glob.

    Raises:
        PictureError: a word stands for nothing.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            paths = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
            )
        elif path.exists():
            paths = [path]
        else:
            matches = glob.glob(word, recursive=True)  # noqa: PTH207 (absolute and relative alike)
            paths = sorted(match for match in map(Path, matches) if match.is_file())
        if not paths:
            kind = "no picture in this folder" if path.is_dir() else "no such picture"
            raise PictureError(f"{word}: {kind}")
        found += paths
    return found
