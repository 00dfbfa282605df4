"""Map + picture -> picture. Knows no model.

A map has one value a patch, (G, J). ``place`` lays it on the pixels of the picture it explains,
``overlay`` and ``dim`` paint it, ``compose`` sets the panels on one labelled sheet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from vitrail.data.framing import Fit, seen_box
from vitrail.errors import ConfigError, nearest
from vitrail.explain.text import (
    INK,
    PAPER,
    SOFT,
    cut,
    draw_caption,
    line_height,
    load_font,
    stack,
    wrap,
)

Normalisation = Literal["frame", "picture", "none"]
Colormap = Literal["magma", "inferno", "plasma", "viridis", "cividis"]
"""All of even perceptual steps; cividis looks the same to every kind of colour vision."""

SCALES: dict[Normalisation, str] = {
    "frame": "each map on its own scale, lowest to highest",
    "picture": "all maps on one scale, lowest to highest",
    "none": "values as they are, cut at 0 and 1",
}
"""How a normalisation is named on the picture."""
LARGEST = 1200
"""Pixels of the longer side that a picture is shown with at most."""
SHEET = 2400
"""Pixels that the pictures of a row have together at most, if that leaves each SMALLEST."""
SMALLEST = 224
"""Pixels of the longer side that a picture is shown with at least."""
VEIL = 0.7
"""Share of light gray over pixels that the model did not see."""
LUMA_C = np.array((0.299, 0.587, 0.114), dtype=np.float32)


def limits(maps_FGJ: np.ndarray, how: Normalisation) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that become 0 and 1, for each of F maps."""
    if how == "none":
        return np.zeros(len(maps_FGJ)), np.ones(len(maps_FGJ))
    if how == "picture":
        return np.full(len(maps_FGJ), maps_FGJ.min()), np.full(len(maps_FGJ), maps_FGJ.max())
    return maps_FGJ.min(axis=(1, 2)), maps_FGJ.max(axis=(1, 2))


def normalise(maps_FGJ: np.ndarray, how: Normalisation) -> np.ndarray:
    """Bring maps to 0..1: each by its own range, all by their common one, or only cut off.

    A map whose values are all the same has nothing to show: it becomes 0.
    """
    low_F, high_F = limits(maps_FGJ, how)
    span_F = np.where(high_F > low_F, high_F - low_F, 1)
    unit_FGJ: np.ndarray = (maps_FGJ - low_F[:, None, None]) / span_F[:, None, None]
    return unit_FGJ.clip(0, 1).astype(np.float32)


def show(picture_HWC: np.ndarray, *, columns: int = 1, largest: int = LARGEST) -> np.ndarray:
    """Return a picture at the size it is shown with, as one of ``columns`` side by side.

    A small one is enlarged by a whole number, its pixels kept as squares; a large one is reduced.
    Every map should be placed on what this returns, so that it is drawn as finely as it is seen.
    """
    height, width = picture_hw = picture_HWC.shape[:2]
    longer, smallest = max(picture_hw), {1: 384, 2: 384, 3: 288}.get(columns, SMALLEST)
    largest = min(largest, max(smallest, SHEET // columns))
    if longer <= largest:
        times = min(math.ceil(smallest / longer), largest // longer)
        return picture_HWC.repeat(times, axis=0).repeat(times, axis=1)
    size = [max(1, round(side * largest / longer)) for side in (width, height)]
    return np.array(Image.fromarray(picture_HWC).resize(size, Image.Resampling.LANCZOS))


def place(
    map_GJ: np.ndarray,
    picture_hw: tuple[int, int],
    model_hw: tuple[int, int],
    fit: Fit,
    *,
    shown_hw: tuple[int, int] | None = None,
) -> np.ndarray:
    """Lay a map on the pixels of the picture, which the model saw fitted to ``model_hw``.

    Bilinear between the centres of the patches, constant beyond the outer ones.

    Args:
        map_GJ: one value a patch.
        picture_hw: the size of the picture as it was read.
        model_hw: the size of the model's images.
        fit: how the picture was brought to that size.
        shown_hw: the size of the picture as it is drawn, if not as it was read.

    Returns:
        map_HW, float32, of the size shown; NaN where the model did not see the picture.
    """
    height, width = shown_hw or picture_hw
    left, top, right, bottom = shown_box(picture_hw, model_hw, fit, shown_hw or picture_hw)
    rows_H = (np.arange(height) + 0.5 - top) / (bottom - top)
    columns_W = (np.arange(width) + 0.5 - left) / (right - left)
    map_HW = stretch(stretch(map_GJ.astype(np.float32), rows_H).T, columns_W).T
    map_HW[(rows_H < 0) | (rows_H > 1)] = np.nan
    map_HW[:, (columns_W < 0) | (columns_W > 1)] = np.nan
    return map_HW


def shown_box(
    picture_hw: tuple[int, int], model_hw: tuple[int, int], fit: Fit, shown_hw: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of what the model saw, in the pixels of the picture shown."""
    left, top, right, bottom = seen_box(picture_hw, model_hw, fit)
    y_scale, x_scale = (shown_hw[axis] / picture_hw[axis] for axis in (0, 1))
    return left * x_scale, top * y_scale, right * x_scale, bottom * y_scale


def stretch(values_GX: np.ndarray, at_P: np.ndarray) -> np.ndarray:
    """Interpolate rows linearly at shares 0..1 of their axis; row g stands at (g + 0.5) / G."""
    last = len(values_GX) - 1
    at_P = np.clip(at_P * (last + 1) - 0.5, 0, last)
    low_P = at_P.astype(int)
    share_P1 = (at_P - low_P).astype(np.float32)[:, None]
    high_P = np.minimum(low_P + 1, last)
    mixed_PX: np.ndarray = values_GX[low_P] * (1 - share_P1) + values_GX[high_P] * share_P1
    return mixed_PX


def colours(colormap: str) -> np.ndarray:
    """Return a colour map's 256 colours as bytes (256, 3).

    Raises:
        ConfigError: there is no such colour map here.
    """
    known = get_args(Colormap)
    if colormap not in known:
        hint = nearest(colormap, known)
        raise ConfigError(f"no colour map {colormap!r}{hint}: choose among {', '.join(known)}")
    table: np.ndarray = matplotlib.colormaps[colormap](np.arange(256), bytes=True)[:, :3]
    return table


def overlay(
    picture_HWC: np.ndarray, map_HW: np.ndarray, *, colormap: str = "magma", alpha: float = 0.6
) -> np.ndarray:
    """Paint a map of 0..1 over the picture in gray, whose hues would mix with the map's.

    Args:
        picture_HWC: bytes.
        map_HW: 0..1, NaN where there is no value: there the picture is gray and veiled.
        colormap: one of ``Colormap``.
        alpha: how opaque the colours are, 0..1, where the map is 0. Where it is high they are more
            so, up to ``alpha * (2 - alpha)``: high values show the color, low ones the picture.
    """
    gray_HW1 = (picture_HWC @ LUMA_C)[:, :, None]
    unseen_HW = np.isnan(map_HW)
    level_HW = np.where(unseen_HW, 0, map_HW)
    colour_HWC = colours(colormap).astype(np.float32)[(level_HW * 255).round().astype(np.uint8)]
    opacity_HW1 = (alpha * (1 + (1 - alpha) * level_HW))[:, :, None]
    painted_HWC = gray_HW1 + opacity_HW1 * (colour_HWC - gray_HW1)
    veiled_HW1 = gray_HW1 + VEIL * (224 - gray_HW1)
    return to_bytes(np.where(unseen_HW[:, :, None], veiled_HW1, painted_HWC))


def dim(picture_HWC: np.ndarray, map_HW: np.ndarray) -> np.ndarray:
    """Return picture x map: bright where the map is 1, black where it is 0 or has no value."""
    return to_bytes(picture_HWC * np.nan_to_num(map_HW)[:, :, None])


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Round 0..255 to bytes."""
    return values.round().clip(0, 255).astype(np.uint8)


def mark_patch(
    shown_HWC: np.ndarray,
    query: tuple[int, int],
    grid_GJ: tuple[int, int],
    box: tuple[float, float, float, float],
) -> np.ndarray:
    """Frame one patch, the query, on a picture; ``box`` is what ``shown_box`` returns."""
    left, top, right, bottom = box
    height, width = (bottom - top) / grid_GJ[0], (right - left) / grid_GJ[1]
    x, y = left + query[1] * width, top + query[0] * height
    image = Image.fromarray(shown_HWC)
    draw = ImageDraw.Draw(image)
    line = max(2, round(max(image.size) / 190))
    edges = [round(x), round(y), round(max(x, x + width - 1)), round(max(y, y + height - 1))]
    # White within black is seen on every ground.
    for grown, colour in ((line, "black"), (0, "white")):
        frame = [edges[0] - grown, edges[1] - grown, edges[2] + grown, edges[3] + grown]
        draw.rectangle(frame, outline=colour, width=line)
    return np.array(image)


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet, and what stands over it."""

    picture_HWC: np.ndarray
    title: str = ""


def compose(
    panels: Sequence[Sequence[Panel]],
    *,
    caption: str = "",
    ink: str = INK,
    colorbar: tuple[str, float, float, str] | None = None,
    row_titles: Sequence[str] = (),
) -> Image.Image:
    """Set rows of panels on one white sheet.

    Args:
        panels: rows of panels; those of one size line up as a grid.
        caption: below; its first line is bold, those after it are small.
        ink: the color of the caption's first line.
        colorbar: a colour map, the values of its ends, and what they are.
        row_titles: text beside each row, read upwards.
    """
    columns = max(map(len, panels))
    pictures = [[Image.fromarray(show(p.picture_HWC, columns=columns)) for p in r] for r in panels]
    width = max(picture.width for row in pictures for picture in row)
    size = round(min(28, max(13, width / 21)))
    besides: Sequence[str | None] = row_titles or [None] * len(panels)
    rows = [
        draw_row(shown, [panel.title for panel in row], beside, width=width, size=size)
        for shown, row, beside in zip(pictures, panels, besides, strict=True)
    ]
    blocks = [stack(rows, gap=size // 2)]
    if colorbar:
        blocks.append(draw_colorbar(colorbar, width=blocks[0].width, size=size))
    if caption:
        blocks.append(draw_caption(caption, width=blocks[0].width, size=size, ink=ink))
    return ImageOps.expand(stack(blocks, gap=round(size * 0.9)), round(size * 1.2), PAPER)


def draw_row(
    pictures: Sequence[Image.Image],
    titles: Sequence[str],
    beside: str | None,
    *,
    width: int,
    size: int,
) -> Image.Image:
    """Set pictures side by side in cells of one width, titles over them and one beside them."""
    font, gap = load_font(size), size // 2
    band = round(line_height(font) * 1.25) if any(titles) else 0
    left = line_height(font) + gap if beside is not None else 0
    height = band + max(picture.height for picture in pictures)
    row = Image.new("RGB", (left + len(pictures) * (width + gap) - gap, height), PAPER)
    draw = ImageDraw.Draw(row)
    for index, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x = left + index * (width + gap)
        row.paste(picture, (x, band))
        draw.text((x, 0), cut(title, font, width), INK, font)
    if beside is not None:
        turned = Image.new("RGB", (height - band, line_height(font)), PAPER)
        text = cut(beside, font, turned.width)
        ImageDraw.Draw(turned).text((turned.width / 2, 0), text, INK, font, anchor="ma")
        row.paste(turned.rotate(90, expand=True), (0, band))
    return row


def draw_colorbar(colorbar: tuple[str, float, float, str], *, width: int, size: int) -> Image.Image:
    """Draw a colour map, then the values of its ends; what they are beside it, or below if long.

    Frames of an animation differ in the values: neither the bar nor the lines move with them.
    """
    colormap, low, high, label = colorbar
    font = load_font(max(12, round(size * 0.8)))
    line, gap = line_height(font), size // 2
    length = min(size * 10, width // 2)
    values, start = f"{low:.3g} to {high:.3g}", length + gap
    beside = start + font.getlength("-1.23e-45 to -1.23e-45" + label) + 2 * gap <= width
    lines = [label] if beside else wrap(label, font, width)
    drawn = Image.new("RGB", (width, line * (1 if beside else 1 + len(lines))), PAPER)
    draw = ImageDraw.Draw(drawn)
    ramp = Image.fromarray(colours(colormap)[None]).resize((length, round(line * 0.62)))
    drawn.paste(ramp, (0, round(line * 0.19)))
    draw.text((start, line / 2), cut(values, font, width - start), INK, font, anchor="lm")
    after = start + round(font.getlength(values)) + 2 * gap
    for index, text in enumerate(lines):
        place_at = (after, line / 2) if beside else (0, line * (index + 1.5))
        draw.text(place_at, text, SOFT, font, anchor="lm")
    return drawn
