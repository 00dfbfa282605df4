"""Picture files: which files are pictures, and their pixels, decoded by Pillow within limits.

Wide gray values (16-bit, 32-bit, floating-point) have a range: the value that becomes black (0) and
the value that becomes white (255). Nothing in such a file says which values are meant, so the range
is inferred from the lowest and highest value of all pictures of a dataset, by ``choose_range``.
"""

import contextlib
import functools
import glob
import importlib
import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from vitrail.errors import DataError, PictureError

Color = tuple[int, int, int]
BYTES = bytes | bytearray | memoryview
Source = str | os.PathLike[str] | BYTES | BinaryIO | Image.Image
"""A picture that Pillow reads: a file name, the content of a file, an open file, or an image."""
PixelRange = tuple[float, float]
"""The values that become 0 and 255."""

WHITE: Color = (255, 255, 255)
MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: 300 MB of RGB is enough."""
MAX_JPEG_PIXELS = 250_000_000
"""Limit of a JPEG, which can be decoded at half its size or less."""
JPEG = ("JPEG", "MPO")
SUFFIXES = frozenset((
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".icb", ".ico", ".j2c", ".j2k", ".jfif",
    ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png",
    ".pnm", ".ppm", ".psd", ".qoi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp",
))  # fmt: skip
"""Suffixes that count as pictures when a folder is searched, whatever the content."""
HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))
"""Suffixes that count as pictures if pillow-heif is installed."""
SIGNED = (
    "AVIF", "BLP", "BMP", "DDS", "FITS", "FTEX", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000",
    "MSP", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TIFF", "WEBP", "XBM", "XPM",
)  # fmt: skip
"""Formats that Pillow detects by their first bytes: such files may have any suffix, or none."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
HEIF_REMEDY = 'install pillow-heif: pip install -e ".[heic]"'
REFUSED = frozenset(("EPS", "IPTC", "WMF"))
"""Formats that Pillow passes to another program, or that may contain such a file."""
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError,
          AttributeError, MemoryError, OverflowError, RuntimeError, struct.error,
          zlib.error)  # fmt: skip
"""What Pillow's decoders raise on corrupt files, besides UnidentifiedImageError."""
INTEGER_TOPS = (255.0, 1023.0, 4095.0, 16_383.0, 65_535.0)
"""Highest values of 8, 10, 12, 14 and 16 bits."""
OVERSHOOT = 0.25
"""Floating-point values from -0.25 to 1.25 count as 0..1 and are clipped: bicubic scaling of 0..1
overshoots by up to 0.235 at a corner (OpenCV's kernel, 1.111 squared; Pillow's less).
"""
LEAST_USED = 1 / 8
"""A warning is logged if less of the range is used: pictures of 32 gray levels or fewer."""

# Pillow refuses PNGs with a text or color profile above 1 MB, such as some programs write.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20, 256 * 2**20


def read_pixels(
    source: Source, *, background: Color = WHITE, shorter_side: int | None = None
) -> np.ndarray:
    """Return RGB bytes (H, W, 3), or gray values (H, W) wider than bytes, unchanged.

    Raises:
        PictureError: see ``read_picture``; the message is the reason only, without the name.
    """
    try:
        if isinstance(source, Image.Image):
            return _extract_pixels(source, background)
        with open_file(source) as file, _open_image(file) as image:
            if image.format in JPEG:
                _reduce_jpeg(image, shorter_side)
            return _extract_pixels(image, background)
    except UnidentifiedImageError as error:
        raise PictureError("not a picture that can be read") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"too large: more than {MAX_PIXELS:,} pixels") from error
    except DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"cannot be read: {reason.splitlines()[0]:.100}") from error


def open_file(source: "str | os.PathLike[str] | BYTES | BinaryIO") -> BinaryIO:
    """Return a file to read from its beginning, which the caller may close.

    Raises:
        PictureError: an open file is closed, or not open for reading in binary mode.
        OSError: a file cannot be opened.
    """
    if isinstance(source, str | os.PathLike):
        return Path(source).open("rb")
    if isinstance(source, BYTES):
        return io.BytesIO(source)
    content: object = None
    try:
        if source.seekable():
            source.seek(0)
        content = source.read()
    except UnicodeDecodeError:  # text mode
        pass
    except (OSError, ValueError) as error:  # closed, or for writing only
        raise PictureError(f"cannot be read: {error}") from error
    if not isinstance(content, bytes):
        raise PictureError("not open in binary mode: open(path, 'rb')")
    return io.BytesIO(content)


def _open_image(file: BinaryIO) -> Image.Image:
    """Open a picture; HEIC with pillow-heif if it is installed."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        if not _is_heif(file):
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


def _is_heif(file: BinaryIO) -> bool:
    """Return whether a file starts like a HEIC or HEIF picture."""
    head = file.read(16)
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


@functools.cache
def register_heif() -> bool:
    """Register pillow-heif with Pillow; return whether it is installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def _reduce_jpeg(image: Image.Image, shorter_side: int | None) -> None:
    """Set up decoding of a JPEG at half, a quarter or an eighth of its size, if that is enough."""
    width, height = image.size
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
    if is_wide_gray(image):
        return np.asarray(image)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def is_wide_gray(image: Image.Image) -> bool:
    """Return whether a picture is gray with values that are wider than bytes."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _too_large(size: tuple[int, int], limit: int) -> PictureError:
    """Return the error of a picture with too many pixels."""
    return PictureError(f"{size[0]} x {size[1]} pixels, more than {limit:,}: make it smaller")


class Extent(NamedTuple):
    """The lowest and highest finite value of some pictures, and whether any is floating-point."""

    low: float
    high: float
    floats: bool


def measure(values_HW: np.ndarray) -> Extent:
    """Return the extent of one picture; 0..0 if none of its values is finite."""
    finite = values_HW[np.isfinite(values_HW)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    return Extent(float(low), float(high), values_HW.dtype.kind == "f")


def join(extents: Iterable[Extent]) -> Extent:
    """Return the extent of several pictures together."""
    lows, highs, floats = zip(*extents, strict=True)
    return Extent(min(lows), max(highs), any(floats))


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
    scaled_HW = np.where(np.isfinite(values_HW), values_HW, 0).astype(np.float64)
    np.clip(scaled_HW, low, high, out=scaled_HW)
    scaled_HW -= low
    scaled_HW *= 255 / ((high - low) or 1.0)
    return scaled_HW.round(out=scaled_HW).astype(np.uint8)


def gray_to_rgb(gray_HW: np.ndarray) -> np.ndarray:
    """Return gray bytes as RGB bytes (H, W, 3)."""
    return np.repeat(gray_HW[:, :, None], 3, axis=2)


def walk_files(root: Path, *, _above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield all files below a folder, sorted folder by folder.

    Hidden files and folders (``.git``, ``.ipynb_checkpoints``) and ``__MACOSX`` are skipped; links
    are followed.

    Raises:
        DataError: a folder cannot be read, or a link leads to a folder that contains it.
    """
    try:
        status = root.stat()
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error.strerror}") from error
    identity = status.st_dev, status.st_ino
    if identity in _above:
        raise DataError(f"{root}: this link leads to a folder that contains it: remove it")
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from walk_files(root / entry.name, _above=_above | {identity})
        elif entry.is_file():
            yield root / entry.name


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is skipped in every search."""
    return name.startswith(".") or name == "__MACOSX"


def is_picture(path: Path) -> bool:
    """Return whether a file counts as a picture when a folder is searched; hidden files do not.

    A common suffix is enough, which is fast; any other file is identified by its content.
    """
    suffix = path.suffix.lower()
    if is_hidden(path.name) or not path.is_file():
        return False
    if suffix in SUFFIXES:
        return True
    if suffix in HEIF_SUFFIXES:
        return register_heif()
    try:
        with Image.open(path, formats=_signed_formats()):
            return True
    except Image.DecompressionBombError:
        return True
    except DECODE_ERRORS:
        return False


@functools.cache
def _signed_formats() -> tuple[str, ...]:
    """Return those of SIGNED that are installed."""
    register_heif()
    Image.init()
    return tuple(name for name in SIGNED if name in Image.OPEN)


def left_out_reason(path: Path) -> str:
    """Return the kind of a file that is not a picture, or that cannot be decoded.

    For example ``.mp4``, ``no suffix``, ``.heic (install pillow-heif)`` or ``broken``.
    """
    suffix = path.suffix.lower() or "no suffix"
    heif = suffix in HEIF_SUFFIXES
    with contextlib.suppress(OSError), path.open("rb") as file:
        heif = heif or _is_heif(file)
    if heif and not register_heif():
        return f"{suffix} (install pillow-heif)"
    return "broken" if is_picture(path) else suffix


def find_pictures(words: Sequence[str]) -> list[Path]:
    """Return the picture files that words name: files, folders (recursively) and glob patterns.

    Raises:
        PictureError: a word matches nothing.
        DataError: a folder cannot be read.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        try:
            if path.is_dir():
                paths = list(filter(is_picture, walk_files(path)))
            elif path.exists():
                paths = [path]
            else:
                paths = sorted(filter(Path.is_file, map(Path, glob.glob(word, recursive=True))))  # noqa: PTH207
        except OSError as error:  # name too long, permission denied
            raise PictureError(f"{word:.200}: {error.strerror}") from error
        if not paths and path.is_dir():
            kinds = Counter(map(left_out_reason, walk_files(path))).most_common(5)
            only = (
                f", only {', '.join(f'{count} {kind}' for kind, count in kinds)}" if kinds else ""
            )
            raise PictureError(f"{word}: no picture in this folder{only}")
        if not paths:
            raise PictureError(f"{word}: no such picture")
        found += paths
    return found
