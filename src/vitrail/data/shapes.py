"""The built-in dataset: textured shapes on cluttered backgrounds, generated, with masks.

Ten classes at random positions, sizes, angles and colors. They are easy for people, but mean colors
carry no information and a linear classifier learns little, since position and colors do not depend
on the class.

Everything except the tables is integer arithmetic, and each number is a hash of (seed, image,
draw): a seed gives the same bytes on every platform, and no image depends on the others.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vitrail.data.images import ImageSet
from vitrail.runtime import rng

SIDE = 32
COUNTS = {"train": 10_000, "test": 2_000}
SEEDS = {"train": 1, "test": 2}
CHUNK = 500
"""Number of images drawn at a time, which bounds memory."""

UNIT = 1024
"""The radius of a shape in its own coordinates."""
TURN = 64
"""Number of angles in a full turn."""
# Rounded to 14 bits; no entry is near a tie, so that the result is the same on all platforms.
COSINES = np.array([round(math.cos(2 * math.pi * i / TURN) * 2**14) for i in range(TURN)], np.int32)
SINES = np.roll(COSINES, TURN // 4)
DISTRACTORS = 6
STRIDE = np.uint64(0x9E3779B97F4A7C15)

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]
Inside = Callable[[Ints, Ints], Bools]


def load_shapes(which: Literal["train", "test"]) -> ImageSet:
    """Return the 10,000 training or the 2,000 test images."""
    return draw_shapes(COUNTS[which], seed=SEEDS[which])


def draw_shapes(count: int, *, seed: int) -> ImageSet:
    """Draw images of the classes in rotation; the masks are exactly the objects' pixels."""
    key = rng.derive_seed(seed, "shapes")
    starts = range(0, count, CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy releases the GIL
        chunks = (np.arange(start, min(start + CHUNK, count)) for start in starts)
        parts = list(pool.map(lambda index_B: _draw_chunk(index_B, key), chunks))
    raw_BHWC = np.concatenate([raw for raw, _ in parts])
    masks_BHW = np.concatenate([masks for _, masks in parts])
    return ImageSet(
        torch.from_numpy(raw_BHWC).permute(0, 3, 1, 2).contiguous(),
        torch.arange(count) % len(CLASSES),
        tuple(CLASSES),
        torch.from_numpy(masks_BHW),
    )


def _draw_chunk(index_B: NDArray[np.int64], key: int) -> tuple[NDArray[np.uint8], Bools]:
    """Draw the images with these indices; return raw (B, H, W, 3) and masks (B, H, W)."""
    draw = _Draws(index_B, key)
    y_HW, x_HW = np.mgrid[:SIDE, :SIDE]
    ground_B3 = draw.numbers(20, 120, columns=3)
    canvas_BHWC = _draw_ground(draw, ground_B3, x_HW, y_HW)
    _draw_distractors(draw, canvas_BHWC, x_HW, y_HW)
    mask_BHW = _draw_mask(draw, index_B % len(CLASSES), x_HW, y_HW)
    paint = _draw_paint(draw, ground_B3, x_HW, y_HW)
    canvas_BHWC = np.where(mask_BHW[..., None], paint, canvas_BHWC)
    noise_BHWC = draw.noise(9).reshape(canvas_BHWC.shape)
    return np.clip(canvas_BHWC + noise_BHWC, 0, 255).astype(np.uint8), mask_BHW


class _Draws:
    """Random integers for a chunk of images: hashes of (key, image, draw)."""

    def __init__(self, index_B: NDArray[np.int64], key: int) -> None:
        self.image_B = _hash_words(index_B.astype(np.uint64) + np.uint64(key))
        self.used = 0

    def numbers(self, low: int, high: int, *, columns: int = 1) -> Ints:
        """Return (B, columns) integers in [low, high), each column a new draw."""
        column = np.arange(self.used, self.used + columns, dtype=np.uint64)
        self.used += columns
        words = _hash_words(self.image_B[:, None] + column * STRIDE)
        spread = (words >> np.uint64(32)) * np.uint64(high - low) >> np.uint64(32)
        return spread.astype(np.int32) + low

    def noise(self, strength: int) -> Ints:
        """Return (B, pixels, 3) integers in [-strength, strength], three from each word."""
        column = np.arange(self.used, self.used + SIDE * SIDE, dtype=np.uint64)
        self.used += SIDE * SIDE
        words = _hash_words(self.image_B[:, None] + column * STRIDE)
        # Little-endian lanes on every machine.
        lanes = words.astype("<u8").view("<u2").reshape(*words.shape, 4)[..., :3].astype(np.int32)
        return (lanes * (2 * strength + 1) >> 16) - strength

    def number(self, low: int, high: int) -> Ints:
        """Return one integer in [low, high) per image, of shape (B, 1, 1)."""
        return self.numbers(low, high)[:, :, None]


def _hash_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words. Source: Steele, Lea and Flood 2014, SplitMix64's finalizer."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _turned(x: Ints, y: Ints, angle: Ints, length: Ints | int) -> tuple[Ints, Ints]:
    """Return rotated coordinates (in sixteenths of a pixel), in units of ``length`` / UNIT."""
    cos, sin = COSINES[angle], SINES[angle]
    scale: Ints = np.asarray(length, np.int32) * (2**14 // UNIT)
    return (cos * x + sin * y) // scale, (cos * y - sin * x) // scale


def _draw_ground(draw: _Draws, ground_B3: Ints, x_HW: Ints, y_HW: Ints) -> Ints:
    """Return backgrounds (B, H, W, 3): a color gradient with waves."""
    angle, period = draw.number(0, TURN), draw.number(5, 14) * 16
    along, across = _turned((x_HW - 16) * 16, (y_HW - 16) * 16, angle, 16 * 16)
    fade_B3 = draw.numbers(-40, 41, columns=3)
    wave = np.abs(across * 16 * 16 // UNIT % period * 2 - period) * draw.number(0, 30) // period
    faded: Ints = ground_B3[:, None, None] + along[..., None] * fade_B3[:, None, None] // UNIT
    waved: Ints = faded + wave[..., None]
    return waved


def _draw_distractors(draw: _Draws, canvas_BHWC: Ints, x_HW: Ints, y_HW: Ints) -> None:
    """Add short lines and specks, too small to be mistaken for a shape."""
    for number in range(DISTRACTORS):
        x, y = draw.number(0, SIDE * 16), draw.number(0, SIDE * 16)
        along, across = _turned(x_HW * 16 - x, y_HW * 16 - y, draw.number(0, TURN), 16)
        line = number % 2 == 0
        length, breadth = (
            (draw.number(3, 9), draw.number(0, 1)) if line else (draw.number(1, 3),) * 2
        )
        inside = (np.abs(along) <= length * UNIT) & (np.abs(across) <= (breadth + 1) * UNIT // 2)
        color_B3 = draw.numbers(20, 200, columns=3)
        canvas_BHWC[inside] = color_B3[inside.nonzero()[0]]


def _draw_mask(draw: _Draws, label_B: NDArray[np.int64], x_HW: Ints, y_HW: Ints) -> Bools:
    """Return the masks (B, H, W) of the objects, which lie entirely inside the image."""
    radius = draw.number(7 * 16, 12 * 16)
    room = SIDE * 16 - 2 * radius
    x = radius + draw.number(0, 4096) * room // 4096
    y = radius + draw.number(0, 4096) * room // 4096
    u, v = _turned(x_HW * 16 + 8 - x, y_HW * 16 + 8 - y, draw.number(0, TURN), radius)
    mask_BHW = np.zeros(u.shape, dtype=bool)
    for label, inside in enumerate(CLASSES.values()):
        chosen = label_B == label
        mask_BHW[chosen] = inside(u[chosen], v[chosen])
    return mask_BHW


def _draw_paint(draw: _Draws, ground_B3: Ints, x_HW: Ints, y_HW: Ints) -> Ints:
    """Return textures (B, H, W, 3): stripes or checks in two shades unlike the background."""
    candidates_B4C = draw.numbers(100, 246, columns=12).reshape(-1, 4, 3)
    far_B4 = np.abs(candidates_B4C - ground_B3[:, None]).sum(axis=2)
    color_B3 = candidates_B4C[np.arange(len(far_B4)), far_B4.argmax(axis=1)]
    shade_B3 = np.clip(color_B3 + draw.numbers(-50, 51, columns=3), 0, 255)
    period = draw.number(3, 7)
    u, v = _turned(x_HW * 16, y_HW * 16, draw.number(0, TURN), 16)
    stripes, rows = u // (UNIT * period) % 2, v // (UNIT * period) % 2
    kind = draw.number(0, 3)
    second = np.select([kind == 0, kind == 1], [stripes, stripes ^ rows], stripes & rows)
    paint: Ints = np.where(second[..., None] > 0, shade_B3[:, None, None], color_B3[:, None, None])
    return paint


def _disc(u: Ints, v: Ints, radius: int, at: tuple[int, int] = (0, 0)) -> Bools:
    """Return which points are in a circle."""
    return (u - at[0]) ** 2 + (v - at[1]) ** 2 <= radius * radius


def _box(u: Ints, v: Ints, half_u: int, half_v: int) -> Bools:
    """Return which points are in a centered rectangle."""
    return (np.abs(u) <= half_u) & (np.abs(v) <= half_v)


def _sides(u: Ints, v: Ints, count: int, distance: int) -> Ints:
    """Return how many of ``count`` half-planes around the center contain each point."""
    held = np.zeros(u.shape, dtype=np.int32)
    for k in range(count):
        angle = 2 * math.pi * k / count
        normal = round(math.cos(angle) * 1024), round(math.sin(angle) * 1024)
        held += normal[0] * u + normal[1] * v <= distance * 1024
    return held


CLASSES: dict[str, Inside] = {
    "circle": lambda u, v: _disc(u, v, 930),
    "ring": lambda u, v: _disc(u, v, 1000) & ~_disc(u, v, 560),
    "square": lambda u, v: _box(u, v, 720, 720),
    "triangle": lambda u, v: _sides(u, v, 3, 500) == 3,
    # A pentagram contains the points on the inner side of at least four of its five lines.
    "star": lambda u, v: _sides(u, v, 5, 330) >= 4,
    "cross": lambda u, v: _box(u, v, 290, 980) | _box(u, v, 980, 290),
    "crescent": lambda u, v: _disc(u, v, 1000) & ~_disc(u, v, 800, (480, 0)),
    "heart": lambda u, v: (
        _disc(u, v, 470, (430, -330))
        | _disc(u, v, 470, (-430, -330))
        | ((v >= -330) & (np.abs(u) * 11 + v * 9 <= 8600) & (np.abs(u) <= 830))
    ),
    "arrow": lambda u, v: (
        ((v >= -1000) & (v <= -50) & (np.abs(u) * 10 <= (v + 1000) * 9))
        | ((v >= -50) & (v <= 950) & (np.abs(u) <= 240))
    ),
    "bar": lambda u, v: _box(u, v, 270, 1000),
}
"""Name and form of each class, in coordinates of the object: v points down, radius UNIT."""
