"""Frames -> an animated GIF or WebP file."""

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from vitrail.config.drawing import Look
from vitrail.config.settings import require

COLORS = 238
"""Colors of a GIF's palette besides 16 grays and the background; Pillow needs one more entry to
mark unchanged pixels."""
LONGEST = 655_350
"""Longest duration of a GIF frame, in milliseconds."""
FADE = (4, 60)
"""Number of frames between two maps, and milliseconds per frame."""
HOLD = 4
"""The last map is shown this many times as long as the others."""
STRENGTH = 12
"""Range of the dither, in levels out of 256."""


def fade(
    frames: Sequence[Image.Image],
    box: tuple[int, int, int, int],
    duration: int,
    *,
    cuts: bool = False,
) -> tuple[list[Image.Image], list[int]]:
    """Return frames that fade into each other inside ``box``, and the duration of each in ms.

    Outside the box, the text of the next frame is already shown. With ``cuts``, nothing fades. The
    last frame is held longer.
    """
    shown, times = [frames[0]], [duration]
    steps, pause = (0, 0) if cuts else FADE
    for before, after in pairwise(frames):
        for step in range(1, steps + 1):
            mixed = Image.blend(before.crop(box), after.crop(box), step / (steps + 1))
            between = after.copy()
            between.paste(mixed, box)
            shown.append(between)
        shown.append(after)
        times += [pause] * steps + [duration]
    times[-1] = min(HOLD * duration, LONGEST)
    return shown, times


def encode_animation(
    frames: Sequence[Image.Image], durations: Sequence[int], suffix: str, look: Look
) -> bytes:
    """Return frames of one size as a GIF with one palette, or as a WebP, which is exact.

    Raises:
        ConfigError: an impossible duration or number of repetitions.
    """
    require(10 <= look.duration <= LONGEST, f"duration is {look.duration} ms: give 10 to 655350")
    require(0 <= look.loop <= 65_535, f"loop is {look.loop}: give 0 (forever) to 65535")
    options: dict[str, Any] = {"lossless": True, "quality": 30, "method": 2}
    if suffix == ".gif":
        frames, options = _share_palette(frames), {"optimize": False}
    file = io.BytesIO()
    frames[0].save(
        file, suffix[1:], save_all=True, append_images=frames[1:], duration=list(durations),
        loop=look.loop, **options,
    )  # fmt: skip
    return file.getvalue()


def _share_palette(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Return frames in the colors of one palette, so that areas that do not change do not flicker.

    Ordered dither smooths the steps between the palette's colors; it depends only on a pixel's
    position, so it does not flicker. The background, the color of the corner, is not dithered.
    """
    pixels_P3 = np.concatenate([np.asarray(frame)[::2, ::2].reshape(-1, 3) for frame in frames])
    # One pixel per color (to six bits): otherwise large areas would take most of the palette.
    red_P, green_P, blue_P = (pixels_P3 >> 2).astype(np.int32).T
    one_of = np.full(1 << 18, -1)
    one_of[red_P << 12 | green_P << 6 | blue_P] = np.arange(len(pixels_P3))
    method = Image.Quantize.MAXCOVERAGE
    chosen = Image.fromarray(pixels_P3[one_of[one_of >= 0]][None]).quantize(
        COLORS, method, kmeans=2
    )
    paper_3 = np.asarray(frames[0])[0, 0]
    grays = [level for level in range(0, 256, 17) for _ in range(3)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([*paper_3.tolist(), *grays, *(chosen.getpalette() or [])[: 3 * COLORS]])
    noise_HWC = _dither(frames[0].height, frames[0].width)
    shared = []
    for frame in frames:
        frame_HWC = np.asarray(frame)
        dithered = Image.fromarray((frame_HWC + noise_HWC).clip(0, 255).astype(np.uint8))
        entries = dithered.quantize(palette=palette, dither=Image.Dither.NONE)
        red, green, blue = (frame_HWC[:, :, channel] == paper_3[channel] for channel in range(3))
        entries.paste(0, mask=Image.fromarray(red & green & blue))
        shared.append(entries)
    return shared


def _dither(height: int, width: int) -> np.ndarray:
    """Return noise for every pixel and channel, without a visible pattern.

    Source: Jimenez 2014, "Next generation post processing in Call of Duty: Advanced Warfare"
    (interleaved gradient noise).
    """
    y, x = np.mgrid[:height, :width]
    channels = [
        52.9829189 * ((0.06711056 * (x + move) + 0.00583715 * (y + move)) % 1) % 1
        for move in (0, 47, 17)
    ]
    return (STRENGTH * (np.stack(channels, axis=2) - 0.5)).astype(np.float32)
