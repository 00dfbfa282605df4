"""Gray values wider than bytes (16-bit, 32-bit, floating-point): one range for a whole data set.

A range is the value that becomes black (0) and the value that becomes white (255). Nothing in such
a file says which values are meant, so the range follows from the lowest and highest value of all
its pictures, by ``choose_range``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

PixelRange = tuple[float, float]
"""The values that become 0 and 255."""

INTEGER_TOPS = (255.0, 1023.0, 4095.0, 16_383.0, 65_535.0)
"""Highest values of 8, 10, 12, 14 and 16 bits."""
OVERSHOOT = 0.25
"""Floating-point values from -0.25 to 1.25 count as 0..1 and are clipped: bicubic scaling of 0..1
overshoots by up to 0.235 at a corner (OpenCV's kernel, 1.111 squared; Pillow's less).
"""
LEAST_USED = 1 / 8
"""A range of which less is used is reported: pictures of 32 gray levels or fewer."""


@dataclass(frozen=True)
class Extent:
    """The lowest and highest finite value of some pictures, and whether any is floating-point."""

    low: float
    high: float
    floats: bool


def measure(values_HW: np.ndarray) -> Extent:
    """Return the extent of one picture; 0..0 if none of its values is finite."""
    lows, highs = [], []
    for part in doubles(values_HW):
        finite = part[np.isfinite(part)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    return Extent(min(lows, default=0.0), max(highs, default=0.0), values_HW.dtype.kind == "f")


def join(extents: Iterable[Extent]) -> Extent:
    """Return the extent of several pictures together."""
    known = list(extents)
    low, high = min(each.low for each in known), max(each.high for each in known)
    return Extent(low, high, any(each.floats for each in known))


def choose_range(extent: Extent) -> PixelRange:
    """Return the range that values of this extent are most probably meant in.

    Integers: the first of 8, 10, 12, 14 and 16 bits that holds them all. Floating-point values:
    0..1 (see OVERSHOOT), or else 0..255 or 0..65535 if these hold them and at least an eighth of
    the range is used. Everything else, as negative values, runs from its lowest to its highest.
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
    """Return what is made of these values in words, with a warning if little of the range is used.

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
    """Return gray bytes (H, W): the range becomes 0..255, values outside are clipped.

    What is not finite counts as 0 before that. A range of one value makes black.
    """
    low, high = pixel_range
    factor = 255 / ((high - low) or 1.0)
    raw, done = np.empty(values_HW.size, np.uint8), 0
    for part in doubles(values_HW):
        part = np.where(np.isfinite(part), part, 0.0).clip(low, high)
        raw[done : done + part.size] = ((part - low) * factor).round()
        done += part.size
    return raw.reshape(values_HW.shape)


def doubles(values_HW: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the values in double precision, a million at a time to save memory."""
    flat = values_HW.reshape(-1)
    for start in range(0, flat.size, 1_000_000):
        with np.errstate(invalid="ignore"):  # NumPy warns of some NaN, which damaged files hold
            yield flat[start : start + 1_000_000].astype(np.float64)
