"""Frames -> one file: a GIF with one palette, a WebP, or a PNG with all frames side by side."""

import io
import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitrail.errors import ConfigError
from vitrail.explain.draw import BACKGROUND
from vitrail.runtime.files import replace_file

PLAIN_SHARE = 0.004
"""A color with at least this share of all pixels gets its own entry in the palette, unchanged."""
COLORS = 255
"""Colors of a GIF's palette; the last of 256 entries means unchanged."""
CELLS = 1 << 18
"""Groups of colors: 64 levels each of red, green and blue."""
STRIP_WIDTH = 2600
"""Width in pixels after which a strip continues in the next row."""


def save_animation(
    frames: Sequence[Image.Image],
    path: Path,
    *,
    durations_ms: int | Sequence[int],
    loop: int | None = 0,
) -> None:
    """Write frames in the format of the file's extension: .gif, .webp (lossless) or .png (a strip).

    Args:
        frames: RGB. Smaller ones are placed at the top left, on white.
        path: the file; its folder is created.
        durations_ms: one for all frames, or one for each; a GIF rounds to 10 ms.
        loop: number of repetitions; 0 means forever, None plays the frames once.

    Raises:
        ConfigError: no frames, another extension, invalid durations.
        OutputError: the file cannot be written.
    """
    if not frames:
        raise ConfigError("there is no frame to save: choose at least one layer or head")
    durations = [durations_ms] * len(frames) if isinstance(durations_ms, int) else durations_ms
    if len(durations) != len(frames) or not all(10 <= each <= 655_350 for each in durations):
        raise ConfigError(
            f"durations are {list(durations)} ms for {len(frames)} frames: "
            "give each one of 10 to 655350"
        )
    if loop is not None and not 0 <= loop <= 65_535:
        raise ConfigError(f"loop is {loop}: give 0 (forever) to 65535")
    frames = same_size(frames)
    if path.suffix.lower() == ".gif":
        replace_file(path, encode_gif(frames, durations, loop))
    elif path.suffix.lower() == ".webp":
        replace_file(path, _encode_webp(frames, durations, loop))
    elif path.suffix.lower() == ".png":
        replace_file(path, encode_png(strip(frames)))
    else:
        raise ConfigError(f"{path}: animations end in .gif, .webp or .png (a strip of the frames)")


def same_size(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Return the frames on white, all with the largest width and height."""
    size = (max(frame.width for frame in frames), max(frame.height for frame in frames))
    canvases = [Image.new("RGB", size, BACKGROUND) for _ in frames]
    for canvas, frame in zip(canvases, frames, strict=True):
        canvas.paste(frame, (0, 0))
    return canvases


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Return the frames, all of one size, side by side, in as many rows as needed."""
    width, height = frames[0].size
    n_rows = math.ceil(len(frames) / max(1, STRIP_WIDTH // width))
    n_columns = math.ceil(len(frames) / n_rows)
    sheet = Image.new("RGB", (n_columns * width, n_rows * height), BACKGROUND)
    for index, frame in enumerate(frames):
        sheet.paste(frame, (index % n_columns * width, index // n_columns * height))
    return sheet


def encode_png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _encode_webp(
    frames: Sequence[Image.Image], durations: Sequence[int], loop: int | None
) -> bytes:
    """Return an animated WebP file, lossless, so that still parts do not change.

    The encoder merges consecutive equal frames into one of their total duration.
    """
    file = io.BytesIO()
    frames[0].save(
        file, "WEBP", save_all=True, append_images=frames[1:], duration=list(durations),
        loop=1 if loop is None else loop, lossless=True, quality=30, method=2,
    )  # fmt: skip
    return file.getvalue()


def encode_gif(frames: Sequence[Image.Image], durations: Sequence[int], loop: int | None) -> bytes:
    """Return a GIF file with one palette for all frames, in which every frame is kept.

    Pillow's own writer gives every frame its own palette and merges equal frames. Here a color maps
    to the same entry of the one palette wherever it occurs, so nothing flickers.

    Source: CompuServe, Graphics Interchange Format, version 89a.
    """
    palette_KC, indexed = quantize([np.asarray(frame) for frame in frames])
    width, height = frames[0].size
    parts = [b"GIF89a", struct.pack("<HHBBB", width, height, 0xF7, 0, 0)]
    parts.append(palette_KC.tobytes().ljust(768, b"\0"))
    if loop is not None:
        parts.append(b"\x21\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<HB", loop, 0))
    for (left, top, part_HW), duration in zip(_changes(indexed), durations, strict=True):
        hundredths, (rows, columns) = round(duration / 10), part_HW.shape
        flags = 4 if part_HW is indexed[0] else 5  # stay until drawn over; 1: with transparency
        parts.append(struct.pack("<HBBHBB", 0xF921, 4, flags, hundredths, COLORS, 0))
        parts.append(struct.pack("<BHHHHBB", 0x2C, left, top, columns, rows, 0, 8))
        parts.append(Image.fromarray(part_HW).tobytes("gif", "L", 8, 0) + b"\0")
    return b"".join([*parts, b"\x3b"])


def _changes(indexed: Sequence[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield left, top, and entries of each frame's changed part; COLORS where unchanged."""
    yield 0, 0, indexed[0]
    for before_HW, after_HW in itertools.pairwise(indexed):
        changed_HW = after_HW != before_HW
        part_HW = np.where(changed_HW, after_HW, np.uint8(COLORS))
        rows, columns = np.nonzero(changed_HW.any(1))[0], np.nonzero(changed_HW.any(0))[0]
        if len(rows) == 0:
            yield 0, 0, part_HW[:1, :1]
        else:
            top, left = int(rows[0]), int(columns[0])
            yield left, top, part_HW[top : rows[-1] + 1, left : columns[-1] + 1]


def quantize(frames: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return one palette (K, 3) of at most COLORS for all frames, and each frame's entries (H, W).

    Colors are counted in cells of 4 levels per channel. A cell's weight is the square root of its
    pixel count, so that large areas leave entries to small bright ones. No dither: it flickers.
    """
    keyed = [_cells_of(frame_HWC) for frame_HWC in frames]
    counts, sums_C = np.zeros(CELLS), np.zeros((3, CELLS))
    for key_HW, frame_HWC in zip(keyed, frames, strict=True):
        counts += np.bincount(key_HW.ravel(), minlength=CELLS)
        for channel in range(3):
            sums_C[channel] += np.bincount(
                key_HW.ravel(), frame_HWC[:, :, channel].ravel(), minlength=CELLS
            )
    cells_M = np.nonzero(counts)[0]
    means_MC = (sums_C[:, cells_M] / counts[cells_M]).T
    palette_KC = _choose_palette(means_MC, counts[cells_M])
    entry_of = np.zeros(CELLS, dtype=np.uint8)
    entry_of[cells_M] = _nearest_entries(means_MC, palette_KC)
    return palette_KC, [entry_of[key_HW] for key_HW in keyed]


def _cells_of(frame_HWC: np.ndarray) -> np.ndarray:
    """Return the cell of each pixel: the upper 6 bits of red, green and blue."""
    red_HW, green_HW, blue_HW = (frame_HWC[:, :, c].astype(np.int32) >> 2 for c in range(3))
    return (red_HW << 12) | (green_HW << 6) | blue_HW


def _choose_palette(colors_MC: np.ndarray, counts_M: np.ndarray) -> np.ndarray:
    """Return at most COLORS colors (K, 3) for M colors with these counts.

    All of them if there are few. Otherwise those of large plain areas, and the best for the rest.
    """
    rounded_MC = colors_MC.round().astype(np.uint8)
    if len(rounded_MC) <= COLORS:
        return rounded_MC
    plain_M = counts_M > PLAIN_SHARE * counts_M.sum()
    weights_M = np.ceil(np.sqrt(counts_M)).astype(int)
    samples_SC = rounded_MC.repeat(np.where(plain_M, 0, weights_M), axis=0)
    n_free = COLORS - int(plain_M.sum())
    reduced = Image.fromarray(samples_SC[None]).quantize(
        n_free, Image.Quantize.MAXCOVERAGE, kmeans=2
    )
    chosen_KC = np.array(reduced.getpalette() or [], dtype=np.uint8)[: 3 * n_free].reshape(-1, 3)
    return np.concatenate([rounded_MC[plain_M], chosen_KC])


def _nearest_entries(colors_MC: np.ndarray, palette_KC: np.ndarray) -> np.ndarray:
    """Return the nearest entry of the palette for each color."""
    entries_KC = palette_KC.astype(np.float32)
    found = []
    for part_MC in np.array_split(colors_MC.astype(np.float32), 1 + len(colors_MC) // 32_768):
        # |c - e|^2 without |c|^2, which is the same for every entry.
        distances_MK = (entries_KC**2).sum(1) - 2 * part_MC @ entries_KC.T
        found.append(distances_MK.argmin(axis=1).astype(np.uint8))
    return np.concatenate(found)
