"""Untrusted pictures: every format that Pillow writes, and headers that claim too many pixels."""

import io
import itertools
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from fuzz.engine import Target, require
from vitrail.data.formats import MAX_PIXELS
from vitrail.data.pictures import Fit, fit_picture, read_picture

PNG = b"\x89PNG\r\n\x1a\n"
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
FITS: tuple[Fit, ...] = ("crop", "pad", "squash")
SKIPPED = {"PDF", "PALM", "BUFR", "GRIB", "HDF5", "WMF"}
"""Formats that Pillow writes and cannot read."""
RAN = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 9 9
(../ran) (w) file closefile
showpage
%%EOF
"""


def attack(data: bytes, folder: Path) -> None:
    """Read a picture, from memory or sometimes from a file, and fit it to a model's size."""
    data = with_checksums(data) if data.startswith(PNG) else data
    source: bytes | Path = data
    if len(data) % 16 == 5:
        source = folder / "a\n-picture.png"
        source.write_bytes(data)
    rgb_HWC = read_picture(source)
    require(rgb_HWC.dtype == np.uint8 and rgb_HWC.shape[2:] == (3,), f"read as {rgb_HWC.shape}")
    require(0 < rgb_HWC.size <= 3 * MAX_PIXELS, f"read as {rgb_HWC.shape}")
    fitted_HWC = fit_picture(rgb_HWC, (8, 12), FITS[len(data) % 3])
    require(fitted_HWC.shape == (8, 12, 3), f"fitted to {fitted_HWC.shape}")


def with_checksums(data: bytes) -> bytes:
    """Correct the checksum of each chunk of a PNG, so that mutations reach the decoder."""
    parts, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        length = min(struct.unpack(">I", data[at : at + 4])[0], len(data) - at - 12)
        body = data[at + 4 : at + 8 + length]
        parts.append(struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts) + data[at:]


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, color: int, *chunks: bytes) -> bytes:
    """Return a PNG with a header and chunks, which may be inconsistent."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return PNG + head + b"".join(chunks) + chunk(b"IEND", b"")


def encoded(image: Image.Image, format: str, **settings: object) -> bytes:
    """Return an image as a file's content."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about deprecated formats
        image.save(file, format, **settings)
    return file.getvalue()


def seeds() -> list[bytes]:
    """Return pictures of every format and mode, and malicious ones."""
    Image.init()
    random = np.random.default_rng(4)
    rgb = Image.fromarray(random.integers(0, 256, (11, 17, 3), dtype=np.uint8))
    found = [encoded(rgb, "PNG")]
    for format, mode in itertools.product(sorted(set(Image.SAVE) - SKIPPED), MODES):
        try:
            image = rgb.convert("L").convert("I").convert(mode) if mode == "I;16" else None
            found.append(encoded(image or rgb.convert(mode), format))
        except (OSError, ValueError, KeyError, SystemError, TypeError):
            continue  # the format does not support this mode
    return found + strange(rgb) + claims()


def strange(rgb: Image.Image) -> list[bytes]:
    """Return unusual but valid pictures, and pictures with broken metadata."""
    frames = [Image.new("RGB", (9, 7), (level, 0, 0)) for level in (10, 90, 250)]
    moving = [
        encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO")
    ]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x\n\x1b[31m"
    meta = [
        encoded(rgb, "JPEG", exif=exif),
        encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff"),
        encoded(rgb, "PNG", exif=exif),
        encoded(rgb, "JPEG", icc_profile=b"\0" * 131),
        encoded(rgb, "PNG", icc_profile=b"broken" * 31),
        encoded(rgb, "WEBP", exif=exif),
        encoded(rgb, "JPEG", progressive=True),
    ]
    thin = [
        encoded(Image.new("RGB", size), kind)
        for size in ((1, 1), (1, 10_000), (10_000, 1))
        for kind in ("PNG", "GIF", "BMP")
    ]
    return moving + meta + thin + [RAN, b"", b"\0", b"no picture"]


def bombs() -> list[bytes]:
    """Return small files that expand: to the most pixels allowed, too much data, long texts."""
    side = 9_999
    rows = zlib.compress(bytes(side * (side // 8 + 2)), 9)
    text = zlib.compress(bytes(30_000_000), 9)
    profile = chunk(b"iCCP", b"a\0\0" + text)
    flat = Image.new("RGB", (2_000, 2_000))
    return [
        png(side, side, 1, 0, chunk(b"IDAT", rows)),
        png(
            side, side, 1, 3, chunk(b"PLTE", b"abc"), chunk(b"tRNS", b"\x80"), chunk(b"IDAT", rows)
        ),
        png(3, 3, 8, 0, chunk(b"zTXt", b"a\0\0" + text), chunk(b"IDAT", zlib.compress(bytes(12)))),
        png(3, 3, 8, 0, profile, chunk(b"IDAT", zlib.compress(bytes(12)))),
        png(3, 3, 8, 0, chunk(b"IDAT", text)),
        *(encoded(flat, kind) for kind in ("JPEG2000", "WEBP", "AVIF", "GIF")),
    ]


def claims() -> list[bytes]:
    """Return headers that claim more pixels than there are."""
    return [
        png(0x7FFFFFFF, 0x7FFFFFFF, 16, 6, chunk(b"IDAT", b"x")),
        png(65_500, 1_500, 16, 6, chunk(b"IDAT", zlib.compress(b"x"))),
        b"GIF89a\xff\xff\xff\xff\xf7\0\0" + bytes(768) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x01\0;",
        b"P6 99999 99999 255\n",
        b"P5 9999 9999 65535\n",
        b"P3 9000 9000 255\n1 2 3",
        b"P4 0 7\n",
        b"P2 3 2 255 1 2 3 4 5 6",
        b"Pf 3 2 -1.0\n" + bytes(24),
        b"P7\nWIDTH 2\nHEIGHT 2\nENDHDR\n",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, 60_000, -60_000, 1, 24, *bytes(6)),
        struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65_535, 1_500, 24, 0) + b"x",
        b"II*\0\x08\0\0\0\x04\0"
        + b"".join(
            struct.pack("<HHII", tag, 4, 1, value)
            for tag, value in ((256, 60_000), (257, 60_000), (258, 8), (273, 8))
        )
        + bytes(4),
        b"qoif" + struct.pack(">IIBB", 9_999, 9_999, 4, 0) + b"\xfd" * 99,
        b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(14),
        b"\xff\xd8\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x22\0\x02\x11\x01\x03\x11\x01\xff\xda",
        b"SIMPLE  =                    T".ljust(80)
        + b"BITPIX  =                    8".ljust(80)
        + b"NAXIS   =                    2".ljust(80)
        + b"NAXIS1  =               999999".ljust(80)
        + b"NAXIS2  =               999999".ljust(80)
        + b"END".ljust(2480),
        b"#define im_width 99999\n#define im_height 99999\nstatic char im_bits[] = {\n0x00",
        b'/* XPM */\nstatic char *x[] = {\n"99999 99999 2 1",\n"a c #000000",\n',
    ]


TARGET = Target("pictures", seeds, attack, bombs)
