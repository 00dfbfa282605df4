"""Frames -> an animated GIF or WebP file."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vitrail.config.settings import Look, require

COLORS = 236
"""Colors of a GIF's palette besides 16 grays; Pillow marks unchanged pixels by one more entry."""
WHITE = 15
"""The entry of the palette that is white."""


def encode_animation(frames: Sequence[Image.Image], suffix: str, look: Look) -> bytes:
    """Return frames of one size as a GIF with one palette, or as a WebP, which is exact.

    Raises:
        ConfigError: an impossible duration or number of repetitions.
    """
    require(
        10 <= look.duration <= 655_350, f"duration is {look.duration} ms: give one of 10 to 655350"
    )
    require(0 <= look.loop <= 65_535, f"loop is {look.loop}: give 0 (forever) to 65535")
    options: dict[str, Any] = {"lossless": True, "quality": 30, "method": 2}
    if suffix == ".gif":
        frames, options = _share_palette(frames), {"optimize": False}
    file = io.BytesIO()
    frames[0].save(
        file, suffix[1:], save_all=True, append_images=frames[1:], duration=look.duration,
        loop=look.loop, **options,
    )  # fmt: skip
    return file.getvalue()


def _share_palette(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Return frames in the colors of one palette, so that what is still stays still.

    Between the palette's colors, ordered dither shows the steps as gradients: it depends on the
    place only, so it does not flicker. White is not dithered.
    """
    pixels_P3 = np.concatenate([np.asarray(frame)[::2, ::2].reshape(-1, 3) for frame in frames])
    # One pixel of each color, to six bits: else large areas would leave too few to small ones.
    _, first = np.unique(
        (pixels_P3 >> 2).astype(np.int32) @ (1 << 12, 1 << 6, 1), return_index=True
    )
    method = Image.Quantize.MAXCOVERAGE
    chosen = Image.fromarray(pixels_P3[first][None]).quantize(COLORS, method, kmeans=2)
    grays = [level for level in range(0, 256, 17) for _ in range(3)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(grays + (chosen.getpalette() or [])[: 3 * COLORS])
    shared = []
    for frame in frames:
        frame_HWC = np.asarray(frame)
        dithered_HWC = (frame_HWC + _dither(frame.height, frame.width)).clip(0, 255)
        dithered = Image.fromarray(dithered_HWC.astype(np.uint8))
        entries = dithered.quantize(palette=palette, dither=Image.Dither.NONE)
        white = Image.fromarray((frame_HWC == 255).all(axis=2))
        entries.paste(WHITE, mask=white)
        shared.append(entries)
    return shared


def _dither(height: int, width: int) -> np.ndarray:
    """Return Bayer's thresholds, from -10 to 10, repeated over a picture, moved in each channel.

    Source: Bayer 1973, "An optimum method for two-level rendition of continuous-tone pictures".
    """
    order = np.zeros((1, 1))
    for _ in range(3):
        order = np.block([[4 * order, 4 * order + 2], [4 * order + 3, 4 * order + 1]])
    moved = [np.roll(order, places, axis=(0, 1)) for places in ((0, 0), (3, 5), (6, 2))]
    tile_HWC = 20 * ((np.stack(moved, axis=2) + 0.5) / 64 - 0.5)
    repeated_HWC = np.tile(tile_HWC, (height // 8 + 1, width // 8 + 1, 1))
    return repeated_HWC[:height, :width]
