"""One picture file -> its pixels: what Pillow needs help with, and the limits of size.

HEIC is read by pillow-heif where it is installed, large JPEGs at reduced scale, PNGs without the
texts that Pillow refuses.
"""

import functools
import importlib
import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from vitrail.errors import PictureError

Color = tuple[int, int, int]
BYTES = bytes | bytearray | memoryview
Source = str | os.PathLike[str] | BYTES | BinaryIO | Image.Image
"""A picture that Pillow reads: a file's name, its content, the open file, or an image."""

WHITE: Color = (255, 255, 255)
MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: 300 MB of RGB is enough."""
MAX_JPEG_PIXELS = 250_000_000
"""A JPEG may have this many, if it can be decoded at half its size or less, row by row."""
JPEG = ("JPEG", "MPO")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
HEIF_REMEDY = 'install pillow-heif: pip install -e ".[heic]"'
MAX_SCANNED = 20 * MAX_PIXELS
"""A JPEG is decoded once a scan: so many pixels of all scans together are enough."""
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


def read_pixels(
    source: Source, *, background: Color = WHITE, shorter_side: int | None = None
) -> np.ndarray:
    """Return RGB bytes (H, W, 3), or gray values (H, W) wider than bytes, as the file has them.

    Raises:
        PictureError: see ``read_picture``; the message is the reason only, without the name.
    """
    try:
        with quiet:
            if isinstance(source, Image.Image):
                return extract_pixels(source, background)
            with open_file(source) as file:
                return read_file(file, background, shorter_side)
    except UnidentifiedImageError as error:
        raise PictureError("not a picture that can be read") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"too large: more than {MAX_PIXELS:,} pixels") from error
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"cannot be read: {reason.splitlines()[0]:.100}") from error


def open_file(source: "str | os.PathLike[str] | BYTES | BinaryIO") -> BinaryIO:
    """Return a file to read from its beginning, which its user may close."""
    if isinstance(source, str | os.PathLike):
        return Path(source).open("rb")
    if isinstance(source, BYTES):
        return io.BytesIO(source)
    if source.seekable():
        source.seek(0)
    content = source.read()
    if not isinstance(content, bytes):
        raise PictureError("not open in binary mode: open(path, 'rb')")
    return io.BytesIO(content)


def read_file(file: BinaryIO, background: Color, shorter_side: int | None) -> np.ndarray:
    """Decode an open file; texts and profiles beside the pixels are skipped where too large."""
    try:
        with open_image(file) as image:
            if image.format in JPEG:
                reduce_jpeg(image, file, shorter_side)
            return extract_pixels(image, background)
    except ValueError as error:
        # A compressed text or color profile above 1 MB, which Pillow refuses; we need neither.
        if "text chunk" not in str(error).lower().replace("_", " "):
            raise
    file.seek(0)
    with Image.open(io.BytesIO(without_texts(file.read()))) as image:
        return extract_pixels(image, background)


def open_image(file: BinaryIO) -> Image.Image:
    """Identify a file's format, HEIC by pillow-heif where it is installed."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        if not is_heif(file.read(16)):
            raise
        if not register_heif():
            raise PictureError(f"a HEIC picture: {HEIF_REMEDY}") from None
    except Image.DecompressionBombError:
        file.seek(0)
        if file.read(3) != b"\xff\xd8\xff":
            raise
        file.seek(0)
        return JpegImagePlugin.JpegImageFile(file)  # reduce_jpeg has a limit of its own
    file.seek(0)
    return Image.open(file)


def is_heif(head: bytes) -> bool:
    """Return whether a file with these first 16 bytes is a HEIC or HEIF picture."""
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


@functools.cache
def register_heif() -> bool:
    """Let Pillow read HEIC by pillow-heif; return whether that is installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def reduce_jpeg(image: Image.Image, file: BinaryIO, shorter_side: int | None) -> None:
    """Let a JPEG be decoded at half, a quarter or an eighth of its size, where that is enough.

    Raises:
        PictureError: it has too many pixels, or decoding it would take too long or too much memory.
    """
    width, height = image.size
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    if width * height * scans > MAX_SCANNED:
        raise PictureError(f"its {width} x {height} pixels come in {scans} scans")
    if width * height > MAX_PIXELS and not is_sequential(image, file):
        raise too_large(image.size, MAX_PIXELS)
    if width * height > MAX_JPEG_PIXELS:
        raise too_large(image.size, MAX_JPEG_PIXELS)
    factor = 1
    while factor < 8 and (
        width * height > MAX_PIXELS * factor**2
        or (shorter_side and min(width, height) // (2 * factor) >= shorter_side)
    ):
        factor *= 2
    if factor > 1:
        image.draft(None, (width // factor, height // factor))


def is_sequential(image: Image.Image, file: BinaryIO) -> bool:
    """Return whether a JPEG is decoded in one pass, row by row, without being held as a whole."""
    if "progressive" in image.info:
        return False
    file.seek(2)
    while (marker := file.read(2)).startswith(b"\xff"):
        length = int.from_bytes(file.read(2))
        if marker == b"\xff\xda":  # the only scan has all color components
            return file.read(1) == bytes([getattr(image, "layers", 0)])
        file.seek(length - 2, io.SEEK_CUR)
    return False


def without_texts(png: bytes) -> bytes:
    """Return a PNG without color profile and texts, except an XMP record, which may turn it."""
    kept, at = [png[:8]], 8
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 40]
        xmp = kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0\0")
        if xmp or kind not in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def extract_pixels(image: Image.Image, background: Color) -> np.ndarray:
    """Return an opened picture as RGB bytes (H, W, 3), or its gray values (H, W) if wider."""
    if image.format in REFUSED:
        raise PictureError(f"{image.format} is a program that draws, not a picture")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise too_large(image.size, MAX_PIXELS)
    if width * height == 0:
        raise PictureError("it has no pixels")
    if getattr(image, "is_animated", False):
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def too_large(size: tuple[int, int], limit: int) -> PictureError:
    """Return the error of a picture with too many pixels."""
    return PictureError(f"{size[0]} x {size[1]} pixels, more than {limit:,}: make it smaller")
