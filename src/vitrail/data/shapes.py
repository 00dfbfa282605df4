"""The embedded data set: textured shapes on cluttered grounds, drawn from a seed, with masks.

Ten classes at random places, sizes, angles and colours. A person names them at a glance, but a mean
colour says nothing and a linear classifier little, as place and colours do not depend on the class.

Everything after the tables is integer arithmetic, and each number a hash of (seed, image, draw):
one seed gives the same bytes on every platform, and no image depends on the others.
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
"""Images drawn at a time: bounds the memory."""

UNIT = 1024
"""Length of a shape's radius in its own coordinates."""
TURN = 64
"""Angles in a whole turn."""
# Rounded to 14 bits; no entry lies near a tie, so that no platform's cosine can round otherwise.
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
    """Draw images of all classes in turn.

    Shapes:
        raw_BCHW (count, 3, 32, 32), labels_B, masks_BHW: exactly the object's pixels.
    """
    key = rng.derive_seed(seed, "shapes")
    starts = range(0, count, CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy works outside of Python's lock
        chunks = (np.arange(start, min(start + CHUNK, count)) for start in starts)
        parts = list(pool.map(lambda index_B: draw_chunk(index_B, key), chunks))
    raw_BHWC = np.concatenate([raw for raw, _ in parts])
    masks_BHW = np.concatenate([masks for _, masks in parts])
    return ImageSet(
        torch.from_numpy(raw_BHWC).permute(0, 3, 1, 2).contiguous(),
        torch.arange(count) % len(CLASSES),
        tuple(CLASSES),
        torch.from_numpy(masks_BHW),
    )


def draw_chunk(index_B: NDArray[np.int64], key: int) -> tuple[NDArray[np.uint8], Bools]:
    """Draw some images by number; return raw (B, H, W, 3) and masks (B, H, W)."""
    draw = Draws(index_B, key)
    y_HW, x_HW = np.mgrid[:SIDE, :SIDE]
    ground_B3 = draw.numbers(20, 120, columns=3)
    canvas_BHWC = draw_ground(draw, ground_B3, x_HW, y_HW)
    draw_distractors(draw, canvas_BHWC, x_HW, y_HW)
    mask_BHW = draw_mask(draw, index_B % len(CLASSES), x_HW, y_HW)
    paint = draw_paint(draw, ground_B3, x_HW, y_HW)
    canvas_BHWC = np.where(mask_BHW[..., None], paint, canvas_BHWC)
    noise_BHWC = draw.noise(9).reshape(canvas_BHWC.shape)
    return np.clip(canvas_BHWC + noise_BHWC, 0, 255).astype(np.uint8), mask_BHW


class Draws:
    """Whole numbers for a chunk of images: hashes of (key, image, draw), uniform enough to see."""

    def __init__(self, index_B: NDArray[np.int64], key: int) -> None:
        self.image_B = hash_words(index_B.astype(np.uint64) + np.uint64(key))
        self.used = 0

    def numbers(self, low: int, high: int, *, columns: int = 1) -> Ints:
        """Return (B, columns) numbers from ``low`` to below ``high``, each column a new draw."""
        column = np.arange(self.used, self.used + columns, dtype=np.uint64)
        self.used += columns
        words = hash_words(self.image_B[:, None] + column * STRIDE)
        spread = (words >> np.uint64(32)) * np.uint64(high - low) >> np.uint64(32)
        return spread.astype(np.int32) + low

    def noise(self, strength: int) -> Ints:
        """Return (B, pixels, 3) numbers from -strength to strength: three lanes of each word."""
        column = np.arange(self.used, self.used + SIDE * SIDE, dtype=np.uint64)
        self.used += SIDE * SIDE
        words = hash_words(self.image_B[:, None] + column * STRIDE)
        # Little-endian lanes on every machine.
        lanes = words.astype("<u8").view("<u2").reshape(*words.shape, 4)[..., :3].astype(np.int32)
        return (lanes * (2 * strength + 1) >> 16) - strength

    def number(self, low: int, high: int) -> Ints:
        """Return one number an image, of shape (B, 1, 1)."""
        return self.numbers(low, high)[:, :, None]


def hash_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words.

    Source: Steele, Lea and Flood 2014, SplitMix64's finalizer.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def turned(x: Ints, y: Ints, angle: Ints, length: Ints | int) -> tuple[Ints, Ints]:
    """Return coordinates (in sixteenths of a pixel) turned, in units of ``length`` / UNIT."""
    cos, sin = COSINES[angle], SINES[angle]
    scale: Ints = np.asarray(length, np.int32) * (2**14 // UNIT)
    return (cos * x + sin * y) // scale, (cos * y - sin * x) // scale


def draw_ground(draw: Draws, ground_B3: Ints, x_HW: Ints, y_HW: Ints) -> Ints:
    """Return grounds (B, H, W, 3): a colour that fades in one direction, with waves on it."""
    angle, period = draw.number(0, TURN), draw.number(5, 14) * 16
    along, across = turned((x_HW - 16) * 16, (y_HW - 16) * 16, angle, 16 * 16)
    fade_B3 = draw.numbers(-40, 41, columns=3)
    wave = np.abs(across * 16 * 16 // UNIT % period * 2 - period) * draw.number(0, 30) // period
    faded: Ints = ground_B3[:, None, None] + along[..., None] * fade_B3[:, None, None] // UNIT
    waved: Ints = faded + wave[..., None]
    return waved


def draw_distractors(draw: Draws, canvas_BHWC: Ints, x_HW: Ints, y_HW: Ints) -> None:
    """Scatter short lines and specks, too small to be a shape of the data."""
    for number in range(DISTRACTORS):
        x, y = draw.number(0, SIDE * 16), draw.number(0, SIDE * 16)
        along, across = turned(x_HW * 16 - x, y_HW * 16 - y, draw.number(0, TURN), 16)
        line = number % 2 == 0
        length, breadth = (
            (draw.number(3, 9), draw.number(0, 1)) if line else (draw.number(1, 3),) * 2
        )
        inside = (np.abs(along) <= length * UNIT) & (np.abs(across) <= (breadth + 1) * UNIT // 2)
        colour_B3 = draw.numbers(20, 200, columns=3)
        canvas_BHWC[inside] = colour_B3[inside.nonzero()[0]]


def draw_mask(draw: Draws, label_B: NDArray[np.int64], x_HW: Ints, y_HW: Ints) -> Bools:
    """Return the pixels (B, H, W) of an object of each class, wholly inside the image."""
    radius = draw.number(7 * 16, 12 * 16)
    room = SIDE * 16 - 2 * radius
    x = radius + draw.number(0, 4096) * room // 4096
    y = radius + draw.number(0, 4096) * room // 4096
    u, v = turned(x_HW * 16 + 8 - x, y_HW * 16 + 8 - y, draw.number(0, TURN), radius)
    mask_BHW = np.zeros(u.shape, dtype=bool)
    for label, inside in enumerate(CLASSES.values()):
        chosen = label_B == label
        mask_BHW[chosen] = inside(u[chosen], v[chosen])
    return mask_BHW


def draw_paint(draw: Draws, ground_B3: Ints, x_HW: Ints, y_HW: Ints) -> Ints:
    """Return textures (B, H, W, 3): two shades far from the ground's, in stripes or checks."""
    candidates_B4C = draw.numbers(100, 246, columns=12).reshape(-1, 4, 3)
    far_B4 = np.abs(candidates_B4C - ground_B3[:, None]).sum(axis=2)
    colour_B3 = candidates_B4C[np.arange(len(far_B4)), far_B4.argmax(axis=1)]
    shade_B3 = np.clip(colour_B3 + draw.numbers(-50, 51, columns=3), 0, 255)
    period = draw.number(3, 7)
    u, v = turned(x_HW * 16, y_HW * 16, draw.number(0, TURN), 16)
    stripes, rows = u // (UNIT * period) % 2, v // (UNIT * period) % 2
    kind = draw.number(0, 3)
    second = np.select([kind == 0, kind == 1], [stripes, stripes ^ rows], stripes & rows)
    paint: Ints = np.where(second[..., None] > 0, shade_B3[:, None, None], colour_B3[:, None, None])
    return paint


def disc(u: Ints, v: Ints, radius: int, at: tuple[int, int] = (0, 0)) -> Bools:
    """Return the points within a circle."""
    return (u - at[0]) ** 2 + (v - at[1]) ** 2 <= radius * radius


def box(u: Ints, v: Ints, half_u: int, half_v: int) -> Bools:
    """Return the points within a rectangle about the middle."""
    return (np.abs(u) <= half_u) & (np.abs(v) <= half_v)


def sides(u: Ints, v: Ints, count: int, distance: int) -> Ints:
    """Return how many of ``count`` half-planes, set round the middle, hold each point."""
    held = np.zeros(u.shape, dtype=np.int32)
    for k in range(count):
        angle = 2 * math.pi * k / count
        normal = round(math.cos(angle) * 1024), round(math.sin(angle) * 1024)
        held += normal[0] * u + normal[1] * v <= distance * 1024
    return held


CLASSES: dict[str, Inside] = {
    "circle": lambda u, v: disc(u, v, 930),
    "ring": lambda u, v: disc(u, v, 1000) & ~disc(u, v, 560),
    "square": lambda u, v: box(u, v, 720, 720),
    "triangle": lambda u, v: sides(u, v, 3, 500) == 3,
    # A pentagram holds the points on the inner side of at least four of its five lines.
    "star": lambda u, v: sides(u, v, 5, 330) >= 4,
    "cross": lambda u, v: box(u, v, 290, 980) | box(u, v, 980, 290),
    "crescent": lambda u, v: disc(u, v, 1000) & ~disc(u, v, 800, (480, 0)),
    "heart": lambda u, v: (
        disc(u, v, 470, (430, -330))
        | disc(u, v, 470, (-430, -330))
        | ((v >= -330) & (np.abs(u) * 11 + v * 9 <= 8600) & (np.abs(u) <= 830))
    ),
    "arrow": lambda u, v: (
        ((v >= -1000) & (v <= -50) & (np.abs(u) * 10 <= (v + 1000) * 9))
        | ((v >= -50) & (v <= 950) & (np.abs(u) <= 240))
    ),
    "bar": lambda u, v: box(u, v, 270, 1000),
}
"""Name and form of each class, in coordinates of the object: v points down, UNIT is the radius."""
