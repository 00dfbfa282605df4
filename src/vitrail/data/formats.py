"""One picture file -> its pixels: Pillow's decoders, with what they lack and limits on size.

HEIC is read by pillow-heif if it is installed, large JPEGs at reduced scale, PNGs without the text
chunks that Pillow refuses.
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
"""A picture that Pillow reads: a file name, the content of a file, an open file, or an image."""

WHITE: Color = (255, 255, 255)
MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: 300 MB of RGB is enough."""
MAX_JPEG_PIXELS = 250_000_000
"""Limit of a JPEG that can be decoded row by row, at half its size or less."""
JPEG = ("JPEG", "MPO")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
HEIF_REMEDY = 'install pillow-heif: pip install -e ".[heic]"'
MAX_SCANNED = 20 * MAX_PIXELS
"""Limit of a JPEG's pixels times its scans, as every scan is decoded."""
REFUSED = frozenset(("EPS", "IPTC", "WMF"))
"""Formats that Pillow passes to another program, or that may contain one of these."""
BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError,
          AttributeError, MemoryError, OverflowError, RuntimeError, struct.error,
          zlib.error)  # fmt: skip
"""What Pillow's decoders raise on corrupt files, besides UnidentifiedImageError."""


class Quiet:
    """Silences Pillow's warnings about metadata and sizes, in any number of threads at once.

    ``catch_warnings`` replaces a list that all threads share, so overlapping uses would restore it
    in the wrong order: here the first to enter replaces it and the last to leave restores it.
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
    """Return RGB bytes (H, W, 3), or gray values (H, W) wider than bytes, unchanged.

    Raises:
        PictureError: see ``read_picture``; the message is the reason only, without the name.
    """
    try:
        with quiet:
            if isinstance(source, Image.Image):
                return _extract_pixels(source, background)
            with open_file(source) as file:
                return _read_file(file, background, shorter_side)
    except UnidentifiedImageError as error:
        raise PictureError("not a picture that can be read") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"too large: more than {MAX_PIXELS:,} pixels") from error
    except BROKEN as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"cannot be read: {reason.splitlines()[0]:.100}") from error


def open_file(source: "str | os.PathLike[str] | BYTES | BinaryIO") -> BinaryIO:
    """Return a file to read from its beginning, which the caller may close."""
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


def _read_file(file: BinaryIO, background: Color, shorter_side: int | None) -> np.ndarray:
    """Decode an open file, skipping texts and color profiles that are too large."""
    try:
        with _open_image(file) as image:
            if image.format in JPEG:
                _reduce_jpeg(image, file, shorter_side)
            return _extract_pixels(image, background)
    except ValueError as error:
        # A compressed text or color profile above 1 MB, which Pillow refuses; neither is needed.
        if "text chunk" not in str(error).lower().replace("_", " "):
            raise
    file.seek(0)
    with Image.open(io.BytesIO(_without_texts(file.read()))) as image:
        return _extract_pixels(image, background)


def _open_image(file: BinaryIO) -> Image.Image:
    """Open a picture, HEIC by pillow-heif if it is installed."""
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
        return JpegImagePlugin.JpegImageFile(file)  # _reduce_jpeg has its own limit
    file.seek(0)
    return Image.open(file)


def is_heif(head: bytes) -> bool:
    """Return whether a file that starts with these 16 bytes is a HEIC or HEIF picture."""
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


@functools.cache
def register_heif() -> bool:
    """Register pillow-heif with Pillow; return whether it is installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _reduce_jpeg(image: Image.Image, file: BinaryIO, shorter_side: int | None) -> None:
    """Set up decoding of a JPEG at half, a quarter or an eighth of its size, if that is enough.

    Raises:
        PictureError: it has too many pixels, or decoding it would take too long or too much memory.
    """
    width, height = image.size
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    if width * height * scans > MAX_SCANNED:
        raise PictureError(f"its {width} x {height} pixels come in {scans} scans")
    if width * height > MAX_PIXELS and not _is_sequential(image, file):
        raise _too_large(image.size, MAX_PIXELS)
    if width * height > MAX_JPEG_PIXELS:
        raise _too_large(image.size, MAX_JPEG_PIXELS)
    factor = 1
    while factor < 8 and (
        width * height > MAX_PIXELS * factor**2
        or (shorter_side and min(width, height) // (2 * factor) >= shorter_side)
    ):
        factor *= 2
    if factor > 1:
        image.draft(None, (width // factor, height // factor))


def _is_sequential(image: Image.Image, file: BinaryIO) -> bool:
    """Return whether a JPEG is decoded in one pass, row by row, without buffering all of it."""
    if "progressive" in image.info:
        return False
    file.seek(2)
    while (marker := file.read(2)).startswith(b"\xff"):
        length = int.from_bytes(file.read(2))
        if marker == b"\xff\xda":  # the only scan has all color components
            return file.read(1) == bytes([getattr(image, "layers", 0)])
        file.seek(length - 2, io.SEEK_CUR)
    return False


def _without_texts(png: bytes) -> bytes:
    """Return a PNG without color profile and texts, except XMP, which may hold the orientation."""
    kept, at = [png[:8]], 8
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 40]
        xmp = kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0\0")
        if xmp or kind not in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def _extract_pixels(image: Image.Image, background: Color) -> np.ndarray:
    """Return an open picture as RGB bytes (H, W, 3), or its gray values (H, W) if wider."""
    if image.format in REFUSED:
        raise PictureError(f"{image.format} files are not supported: they can contain programs")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(image.size, MAX_PIXELS)
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


def _too_large(size: tuple[int, int], limit: int) -> PictureError:
    """Return the error of a picture with too many pixels."""
    return PictureError(f"{size[0]} x {size[1]} pixels, more than {limit:,}: make it smaller")
