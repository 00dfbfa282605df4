"""Frames -> one file: a GIF with one palette, a WebP, or a PNG with all of them side by side."""

import io
import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitrail.errors import ConfigError
from vitrail.explain.render import SCALES, Panel, compose, dim, normalise, place
from vitrail.explain.text import INK, PAPER
from vitrail.runtime.files import replace_file

REFERENCE_DURATION = 500
"""Milliseconds that the reference system shows a frame."""
PLAIN = 0.004
"""Share of all pixels from which a colour gets its own entry in the palette, unchanged."""
COLOURS = 255
"""Colours of a GIF's palette; the last of 256 entries stands for what has not changed."""
CELLS = 1 << 18
"""Groups of colours: 64 steps of each of red, green and blue."""
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
        frames: RGB. Those smaller than the largest stand at its top left, on white.
        path: the file; its folder is made.
        durations_ms: for every frame or for each; a GIF counts in steps of 10 ms.
        loop: how often the frames are repeated, 0 for ever, None to play them once.

    Raises:
        ConfigError: no frames, another ending, durations that do not fit.
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
        raise ConfigError(f"loop is {loop}: give 0 (for ever) to 65535")
    frames = same_size(frames)
    if path.suffix.lower() == ".gif":
        replace_file(path, encode_gif(frames, durations, loop))
    elif path.suffix.lower() == ".webp":
        replace_file(path, encode_webp(frames, durations, loop))
    elif path.suffix.lower() == ".png":
        replace_file(path, encode_png(strip(frames)))
    else:
        raise ConfigError(f"{path}: animations end in .gif, .webp or .png (a strip of the frames)")


def same_size(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Return the frames on white grounds of the largest width and height."""
    size = (max(frame.width for frame in frames), max(frame.height for frame in frames))
    grounds = [Image.new("RGB", size, PAPER) for _ in frames]
    for ground, frame in zip(grounds, frames, strict=True):
        ground.paste(frame, (0, 0))
    return grounds


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Return the frames, all of one size, side by side, in as many rows as they need."""
    width, height = frames[0].size
    n_rows = math.ceil(len(frames) / max(1, STRIP_WIDTH // width))
    n_columns = math.ceil(len(frames) / n_rows)
    sheet = Image.new("RGB", (n_columns * width, n_rows * height), PAPER)
    for index, frame in enumerate(frames):
        sheet.paste(frame, (index % n_columns * width, index // n_columns * height))
    return sheet


def encode_png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def encode_webp(frames: Sequence[Image.Image], durations: Sequence[int], loop: int | None) -> bytes:
    """Return an animated WebP file. Lossless, so that what stands still stays as it is.

    Its encoder joins frames that follow each other and are equal into one that lasts as long.
    """
    file = io.BytesIO()
    frames[0].save(
        file, "WEBP", save_all=True, append_images=frames[1:], duration=list(durations),
        loop=1 if loop is None else loop, lossless=True, quality=30, method=2,
    )  # fmt: skip
    return file.getvalue()


def encode_gif(frames: Sequence[Image.Image], durations: Sequence[int], loop: int | None) -> bytes:
    """Return a GIF file with one palette for all frames, in which every frame is kept.

    Pillow's own writer gives every frame its palette and joins frames that are equal. Here a
    colour becomes the same entry of the one palette wherever it occurs, so nothing flickers.

    Source: CompuServe, Graphics Interchange Format, version 89a.
    """
    palette_KC, indexed = quantise([np.asarray(frame) for frame in frames])
    width, height = frames[0].size
    parts = [b"GIF89a", struct.pack("<HHBBB", width, height, 0xF7, 0, 0)]
    parts.append(palette_KC.tobytes().ljust(768, b"\0"))
    if loop is not None:
        parts.append(b"\x21\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<HB", loop, 0))
    for (left, top, part_HW), duration in zip(changes(indexed), durations, strict=True):
        hundredths, (rows, columns) = round(duration / 10), part_HW.shape
        flags = 4 if part_HW is indexed[0] else 5  # stay until drawn over; 1: with transparency
        parts.append(struct.pack("<HBBHBB", 0xF921, 4, flags, hundredths, COLOURS, 0))
        parts.append(struct.pack("<BHHHHBB", 0x2C, left, top, columns, rows, 0, 8))
        parts.append(Image.fromarray(part_HW).tobytes("gif", "L", 8, 0) + b"\0")
    return b"".join([*parts, b"\x3b"])


def changes(indexed: Sequence[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield left, top, and entries of each frame's changed part; COLOURS where nothing changed."""
    yield 0, 0, indexed[0]
    for before_HW, after_HW in itertools.pairwise(indexed):
        changed_HW = after_HW != before_HW
        part_HW = np.where(changed_HW, after_HW, np.uint8(COLOURS))
        rows, columns = np.nonzero(changed_HW.any(1))[0], np.nonzero(changed_HW.any(0))[0]
        if len(rows) == 0:
            yield 0, 0, part_HW[:1, :1]
        else:
            top, left = int(rows[0]), int(columns[0])
            yield left, top, part_HW[top : rows[-1] + 1, left : columns[-1] + 1]


def quantise(frames: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return one palette (K, 3) of at most COLOURS for all frames, and each frame's entries (H, W).

    Colours are counted in cells of 4 levels a channel. A cell's weight is the square root of its
    pixels, so that large areas leave colours to small bright ones. No dither: it flickers.
    """
    keyed = [cells_of(frame_HWC) for frame_HWC in frames]
    counts, sums_C = np.zeros(CELLS), np.zeros((3, CELLS))
    for key_HW, frame_HWC in zip(keyed, frames, strict=True):
        counts += np.bincount(key_HW.ravel(), minlength=CELLS)
        for channel in range(3):
            sums_C[channel] += np.bincount(
                key_HW.ravel(), frame_HWC[:, :, channel].ravel(), minlength=CELLS
            )
    cells_M = np.nonzero(counts)[0]
    means_MC = (sums_C[:, cells_M] / counts[cells_M]).T
    palette_KC = choose_palette(means_MC, counts[cells_M])
    entry_of = np.zeros(CELLS, dtype=np.uint8)
    entry_of[cells_M] = nearest_entries(means_MC, palette_KC)
    return palette_KC, [entry_of[key_HW] for key_HW in keyed]


def cells_of(frame_HWC: np.ndarray) -> np.ndarray:
    """Return for each pixel the number of its cell: the upper 6 bits of red, green and blue."""
    red_HW, green_HW, blue_HW = (frame_HWC[:, :, c].astype(np.int32) >> 2 for c in range(3))
    return (red_HW << 12) | (green_HW << 6) | blue_HW


def choose_palette(colours_MC: np.ndarray, counts_M: np.ndarray) -> np.ndarray:
    """Return at most COLOURS colours (K, 3) for M that occur so often.

    All of them if they are few. Else those of large plain areas, and the best for the others.
    """
    rounded_MC = colours_MC.round().astype(np.uint8)
    if len(rounded_MC) <= COLOURS:
        return rounded_MC
    plain_M = counts_M > PLAIN * counts_M.sum()
    weights_M = np.ceil(np.sqrt(counts_M)).astype(int)
    samples_SC = rounded_MC.repeat(np.where(plain_M, 0, weights_M), axis=0)
    n_free = COLOURS - int(plain_M.sum())
    reduced = Image.fromarray(samples_SC[None]).quantize(
        n_free, Image.Quantize.MAXCOVERAGE, kmeans=2
    )
    chosen_KC = np.array(reduced.getpalette() or [], dtype=np.uint8)[: 3 * n_free].reshape(-1, 3)
    return np.concatenate([rounded_MC[plain_M], chosen_KC])


def nearest_entries(colours_MC: np.ndarray, palette_KC: np.ndarray) -> np.ndarray:
    """Return for each colour the entry of the palette that is nearest to it."""
    entries_KC = palette_KC.astype(np.float32)
    found = []
    for part_MC in np.array_split(colours_MC.astype(np.float32), 1 + len(colours_MC) // 32_768):
        # |c - e|^2 without |c|^2, which is the same for every entry.
        distances_MK = (entries_KC**2).sum(1) - 2 * part_MC @ entries_KC.T
        found.append(distances_MK.argmin(axis=1).astype(np.uint8))
    return np.concatenate(found)


def reference_masks(rollout_LGJ: np.ndarray) -> np.ndarray:
    """Return the reference system's masks: each layer's map divided by its maximum."""
    highest_L11: np.ndarray = rollout_LGJ.max(axis=(1, 2), keepdims=True)
    masks_LGJ: np.ndarray = rollout_LGJ / highest_L11.clip(np.finfo(np.float32).tiny)
    return masks_LGJ


def reference_frames(
    picture_HWC: np.ndarray,
    rollout_LGJ: np.ndarray,
    *,
    title: str = "",
    prediction: str = "",
    ink: str = INK,
    layers: Sequence[int] | None = None,
) -> list[Image.Image]:
    """Return the reference system's frames: the picture, and beside it the picture x the mask.

    Each mask is brought to the picture bilinearly. The reference's own masks keep their minimum,
    which rises from layer to layer until nothing is dark; here each is drawn from its minimum
    (black) to its maximum (as bright as the picture), and the frame says so.

    Args:
        picture_HWC: bytes, the model's own small pixels.
        rollout_LGJ: the flow of attention up to each layer, class-token row.
        title: the picture's label, in brackets after "Original".
        prediction: what the model says, with its probability; drawn below.
        ink: the color of the prediction.
        layers: the layers' numbers, if not 1 to L.
    """
    original = Panel(picture_HWC, f"Original ({title})" if title else "Original")
    caption = f"{prediction}\nbrightness: {SCALES['frame']}".strip()
    frames = []
    numbers = layers or range(1, len(rollout_LGJ) + 1)
    for number, mask_GJ in zip(
        numbers, normalise(reference_masks(rollout_LGJ), "frame"), strict=True
    ):
        picture_hw = picture_HWC.shape[:2]
        dimmed_HWC = dim(picture_HWC, place(mask_GJ, picture_hw, picture_hw, "squash"))
        panels = [original, Panel(dimmed_HWC, f"Rollout through layer {number}")]
        frames.append(compose([panels], caption=caption, ink=ink))
    return frames
