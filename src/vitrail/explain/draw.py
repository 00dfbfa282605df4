"""Map + picture -> picture. Uses no model.

A map has one value per patch, (G, J). ``place`` resizes it to the pixels of the picture it
explains, ``overlay`` and ``dim`` paint it, ``compose`` puts the panels on one labeled sheet, in the
one font that comes with matplotlib.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vitrail.config.settings import Colormap, Normalization
from vitrail.data.pictures import Fit, seen_box
from vitrail.errors import ConfigError, nearest

SCALES: dict[Normalization, str] = {
    "frame": "each map on its own scale, lowest to highest",
    "picture": "all maps on one scale, lowest to highest",
    "none": "unscaled values, clipped to 0 and 1",
}
"""How a normalization is described on the picture."""
LARGEST_SIDE = 1200
"""A picture's longer side is drawn with at most this many pixels."""
LARGEST_ROW = 2400
"""The pictures of a row have at most this many pixels together, if each has SMALLEST_SIDE."""
SMALLEST_SIDE = 224
"""A picture's longer side is drawn with at least this many pixels."""
UNSEEN_OPACITY = 0.7
"""Opacity of the light gray over pixels that the model did not see."""
LUMA_C = np.array((0.299, 0.587, 0.114), dtype=np.float32)
Font = ImageFont.FreeTypeFont
BACKGROUND, BLACK, GRAY = "#ffffff", "#1f2328", "#656d76"
"""Background, text, and less important text."""
RED, GREEN = "#b42318", "#1a7f37"
"""Text of a wrong and of a correct answer."""

MAX_CHARACTERS = 1000
"""The rest of a text is ignored: names are untrusted input."""


def limits(maps_FGJ: np.ndarray, how: Normalization) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that become 0 and 1, for each of F maps."""
    if how == "none":
        return np.zeros(len(maps_FGJ)), np.ones(len(maps_FGJ))
    if how == "picture":
        return np.full(len(maps_FGJ), maps_FGJ.min()), np.full(len(maps_FGJ), maps_FGJ.max())
    return maps_FGJ.min(axis=(1, 2)), maps_FGJ.max(axis=(1, 2))


def normalize(maps_FGJ: np.ndarray, how: Normalization) -> np.ndarray:
    """Scale maps to 0..1: each by its own range, all by their common range, or only clip them.

    A uniform map has nothing to show: it becomes 0.
    """
    low_F, high_F = limits(maps_FGJ, how)
    span_F = np.where(high_F > low_F, high_F - low_F, 1)
    unit_FGJ: np.ndarray = (maps_FGJ - low_F[:, None, None]) / span_F[:, None, None]
    return unit_FGJ.clip(0, 1).astype(np.float32)


def show(picture_HWC: np.ndarray, *, columns: int = 1, largest: int = LARGEST_SIDE) -> np.ndarray:
    """Return a picture at the size at which it is drawn, as one of ``columns`` side by side.

    A small one is enlarged by an integer factor, its pixels kept as squares; a large one is
    reduced. Maps should be placed on the result, so that they have its resolution.
    """
    height, width = picture_hw = picture_HWC.shape[:2]
    longer, smallest = max(picture_hw), {1: 384, 2: 384, 3: 288}.get(columns, SMALLEST_SIDE)
    largest = min(largest, max(smallest, LARGEST_ROW // columns))
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
    """Resize a map to the pixels of the picture, which the model saw fitted to ``model_hw``.

    Bilinear between the centers of the patches, constant beyond the outer ones.

    Args:
        map_GJ: one value per patch.
        picture_hw: the size of the picture as it was read.
        model_hw: the size of the model's images.
        fit: how the picture was fitted to that size.
        shown_hw: the size at which the picture is drawn. Default: its own.

    Returns:
        map_HW, float32, of the drawn size; NaN where the model did not see the picture.
    """
    height, width = shown_hw or picture_hw
    left, top, right, bottom = shown_box(picture_hw, model_hw, fit, shown_hw or picture_hw)
    rows_H = (np.arange(height) + 0.5 - top) / (bottom - top)
    columns_W = (np.arange(width) + 0.5 - left) / (right - left)
    map_HW = _stretch(_stretch(map_GJ.astype(np.float32), rows_H).T, columns_W).T
    map_HW[(rows_H < 0) | (rows_H > 1)] = np.nan
    map_HW[:, (columns_W < 0) | (columns_W > 1)] = np.nan
    return map_HW


def shown_box(
    picture_hw: tuple[int, int], model_hw: tuple[int, int], fit: Fit, shown_hw: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of what the model saw, in pixels of the drawn picture."""
    left, top, right, bottom = seen_box(picture_hw, model_hw, fit)
    y_scale, x_scale = (shown_hw[axis] / picture_hw[axis] for axis in (0, 1))
    return left * x_scale, top * y_scale, right * x_scale, bottom * y_scale


def _stretch(values_GX: np.ndarray, at_P: np.ndarray) -> np.ndarray:
    """Interpolate rows linearly at positions 0..1 of their axis; row g is at (g + 0.5) / G."""
    last = len(values_GX) - 1
    at_P = np.clip(at_P * (last + 1) - 0.5, 0, last)
    low_P = at_P.astype(int)
    share_P1 = (at_P - low_P).astype(np.float32)[:, None]
    high_P = np.minimum(low_P + 1, last)
    mixed_PX: np.ndarray = values_GX[low_P] * (1 - share_P1) + values_GX[high_P] * share_P1
    return mixed_PX


def colormap_bytes(colormap: str) -> np.ndarray:
    """Return a color map's 256 colors as bytes (256, 3).

    Raises:
        ConfigError: an unknown color map.
    """
    known = get_args(Colormap)
    if colormap not in known:
        hint = nearest(colormap, known)
        raise ConfigError(f"no color map {colormap!r}{hint}: one of {', '.join(known)}")
    table: np.ndarray = matplotlib.colormaps[colormap](np.arange(256), bytes=True)[:, :3]
    return table


def overlay(
    picture_HWC: np.ndarray, map_HW: np.ndarray, *, colormap: str = "magma", alpha: float = 0.6
) -> np.ndarray:
    """Paint a map of 0..1 over the picture in gray, since its hues would mix with the map's.

    Args:
        picture_HWC: bytes.
        map_HW: 0..1, NaN where there is no value: there the picture is covered with light gray.
        colormap: one of ``Colormap``.
        alpha: opacity of the colors, 0..1, where the map is 0. It rises with the map, up to
            ``alpha * (2 - alpha)``: high values show the color, low ones the picture.
    """
    gray_HW1 = (picture_HWC @ LUMA_C)[:, :, None]
    unseen_HW = np.isnan(map_HW)
    level_HW = np.where(unseen_HW, 0, map_HW)
    color_HWC = colormap_bytes(colormap).astype(np.float32)[
        (level_HW * 255).round().astype(np.uint8)
    ]
    opacity_HW1 = (alpha * (1 + (1 - alpha) * level_HW))[:, :, None]
    painted_HWC = gray_HW1 + opacity_HW1 * (color_HWC - gray_HW1)
    covered_HW1 = gray_HW1 + UNSEEN_OPACITY * (224 - gray_HW1)
    return _to_bytes(np.where(unseen_HW[:, :, None], covered_HW1, painted_HWC))


def dim(picture_HWC: np.ndarray, map_HW: np.ndarray) -> np.ndarray:
    """Return picture x map: bright where the map is 1, black where it is 0 or has no value."""
    return _to_bytes(picture_HWC * np.nan_to_num(map_HW)[:, :, None])


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Round 0..255 to bytes."""
    return values.round().clip(0, 255).astype(np.uint8)


def mark_patch(
    shown_HWC: np.ndarray,
    query: tuple[int, int],
    grid_GJ: tuple[int, int],
    box: tuple[float, float, float, float],
) -> np.ndarray:
    """Outline one patch, the query, on a picture; ``box`` is from ``shown_box``."""
    left, top, right, bottom = box
    height, width = (bottom - top) / grid_GJ[0], (right - left) / grid_GJ[1]
    x, y = left + query[1] * width, top + query[0] * height
    image = Image.fromarray(shown_HWC)
    draw = ImageDraw.Draw(image)
    line = max(2, round(max(image.size) / 190))
    edges = [round(x), round(y), round(max(x, x + width - 1)), round(max(y, y + height - 1))]
    # White inside black is visible on every background.
    for grown, color in ((line, "black"), (0, "white")):
        frame = [edges[0] - grown, edges[1] - grown, edges[2] + grown, edges[3] + grown]
        draw.rectangle(frame, outline=color, width=line)
    return np.array(image)


# The sheet.


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet, and its title."""

    picture_HWC: np.ndarray
    title: str = ""


def compose(
    panels: Sequence[Sequence[Panel]],
    *,
    caption: str = "",
    ink: str = BLACK,
    colorbar: tuple[str, float, float, str] | None = None,
    row_titles: Sequence[str] = (),
) -> Image.Image:
    """Draw rows of panels on one white sheet.

    Args:
        panels: rows of panels; panels of equal size form a grid.
        caption: text below; the first line is bold, the others are small.
        ink: the color of the caption's first line.
        colorbar: a color map, the values at its ends, and a label.
        row_titles: text beside each row, rotated.
    """
    columns = max(map(len, panels))
    pictures = [[Image.fromarray(show(p.picture_HWC, columns=columns)) for p in r] for r in panels]
    width = max(picture.width for row in pictures for picture in row)
    size = round(min(28, max(13, width / 21)))
    besides: Sequence[str | None] = row_titles or [None] * len(panels)
    rows = [
        _draw_row(shown, [panel.title for panel in row], beside, width=width, size=size)
        for shown, row, beside in zip(pictures, panels, besides, strict=True)
    ]
    blocks = [_stack(rows, gap=size // 2)]
    if colorbar:
        blocks.append(_draw_colorbar(colorbar, width=blocks[0].width, size=size))
    if caption:
        blocks.append(draw_caption(caption, width=blocks[0].width, size=size, ink=ink))
    return ImageOps.expand(_stack(blocks, gap=round(size * 0.9)), round(size * 1.2), BACKGROUND)


def _draw_row(
    pictures: Sequence[Image.Image],
    titles: Sequence[str],
    beside: str | None,
    *,
    width: int,
    size: int,
) -> Image.Image:
    """Draw pictures side by side in cells of equal width, with titles above and at the left."""
    font, gap = load_font(size), size // 2
    band = round(line_height(font) * 1.25) if any(titles) else 0
    left = line_height(font) + gap if beside is not None else 0
    height = band + max(picture.height for picture in pictures)
    row = Image.new("RGB", (left + len(pictures) * (width + gap) - gap, height), BACKGROUND)
    draw = ImageDraw.Draw(row)
    for index, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x = left + index * (width + gap)
        row.paste(picture, (x, band))
        draw.text((x, 0), cut(title, font, width), BLACK, font)
    if beside is not None:
        turned = Image.new("RGB", (height - band, line_height(font)), BACKGROUND)
        text = cut(beside, font, turned.width)
        ImageDraw.Draw(turned).text((turned.width / 2, 0), text, BLACK, font, anchor="ma")
        row.paste(turned.rotate(90, expand=True), (0, band))
    return row


def _draw_colorbar(
    colorbar: tuple[str, float, float, str], *, width: int, size: int
) -> Image.Image:
    """Draw a color map, then the values at its ends; the label beside them, or below if long.

    Frames of an animation differ in the values: neither the bar nor the lines move with them.
    """
    colormap, low, high, label = colorbar
    font = load_font(max(12, round(size * 0.8)))
    line, gap = line_height(font), size // 2
    length = min(size * 10, width // 2)
    values, start = f"{low:.3g} to {high:.3g}", length + gap
    beside = start + font.getlength("-1.23e-45 to -1.23e-45" + label) + 2 * gap <= width
    lines = [label] if beside else wrap(label, font, width)
    drawn = Image.new("RGB", (width, line * (1 if beside else 1 + len(lines))), BACKGROUND)
    draw = ImageDraw.Draw(drawn)
    ramp = Image.fromarray(colormap_bytes(colormap)[None]).resize((length, round(line * 0.62)))
    drawn.paste(ramp, (0, round(line * 0.19)))
    draw.text((start, line / 2), cut(values, font, width - start), BLACK, font, anchor="lm")
    after = start + round(font.getlength(values)) + 2 * gap
    for index, text in enumerate(lines):
        place_at = (after, line / 2) if beside else (0, line * (index + 1.5))
        draw.text(place_at, text, GRAY, font, anchor="lm")
    return drawn


def draw_caption(caption: str, *, width: int, size: int, ink: str = BLACK) -> Image.Image:
    """Draw lines of text, the first one bold, larger and in the given color."""
    first, *others = caption.split("\n")
    bold, plain = load_font(round(size * 1.2), bold=True), load_font(max(12, round(size * 0.8)))
    lines = [(text, bold, ink) for text in wrap(first, bold, width)]
    lines += [(text, plain, GRAY) for other in others for text in wrap(other, plain, width)]
    drawn = Image.new("RGB", (width, sum(line_height(font) for _, font, _ in lines)), BACKGROUND)
    draw, y = ImageDraw.Draw(drawn), 0
    for text, font, color in lines:
        draw.text((0, y), text, color, font)
        y += line_height(font)
    return drawn


def _stack(blocks: Sequence[Image.Image], *, gap: int) -> Image.Image:
    """Draw pictures below each other, left-aligned."""
    height = sum(block.height for block in blocks) + gap * (len(blocks) - 1)
    stacked = Image.new("RGB", (max(block.width for block in blocks), height), BACKGROUND)
    y = 0
    for block in blocks:
        stacked.paste(block, (0, y))
        y += block.height + gap
    return stacked


# Text.


def load_font(size: int, *, bold: bool = False) -> Font:
    """Return DejaVu Sans of ``size`` pixels."""
    return ImageFont.truetype(_font_path(bold=bold), size)


def _font_path(*, bold: bool) -> str:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@cache
def _known_characters() -> frozenset[int]:
    """Return the code points that both weights of the font can draw."""
    both = [FT2Font(_font_path(bold=bold)).get_charmap() for bold in (False, True)]
    return frozenset(both[0]) & frozenset(both[1])


def drawable(text: str) -> str:
    """Return the text with every character that cannot be drawn as the replacement character."""
    known = _known_characters()
    return "".join(
        letter if letter.isprintable() and ord(letter) in known else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def cut(text: str, font: Font, width: float) -> str:
    """Return the drawable text, cut with … at the end if it is wider than ``width`` pixels."""
    text = drawable(text[:MAX_CHARACTERS])
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Wrap one line at spaces into lines of at most ``width`` pixels; cut longer words."""
    lines: list[str] = []
    for word in text[:MAX_CHARACTERS].split(" "):
        longer = f"{lines[-1]} {drawable(word)}" if lines else ""
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(cut(word, font, width))
    return lines


def line_height(font: Font) -> int:
    """Return the height of a line of text in pixels."""
    return round(sum(font.getmetrics()) * 1.1)


# The reference implementation's frames.


def reference_masks(rollout_LGJ: np.ndarray) -> np.ndarray:
    """Return the reference implementation's masks: each layer's map divided by its maximum."""
    highest_L11: np.ndarray = rollout_LGJ.max(axis=(1, 2), keepdims=True)
    masks_LGJ: np.ndarray = rollout_LGJ / highest_L11.clip(np.finfo(np.float32).tiny)
    return masks_LGJ


def reference_frames(
    picture_HWC: np.ndarray,
    rollout_LGJ: np.ndarray,
    *,
    title: str = "",
    prediction: str = "",
    ink: str = BLACK,
    layers: Sequence[int] | None = None,
) -> list[Image.Image]:
    """Return the reference implementation's frames: the picture, and the picture x the mask.

    Each mask is resized to the picture bilinearly. The reference's own masks keep their minimum,
    which rises from layer to layer until nothing is dark; here each is drawn from its minimum
    (black) to its maximum (as bright as the picture), and the frame says so.

    Args:
        picture_HWC: bytes, the model's own small pixels.
        rollout_LGJ: the rollout through each layer, class-token row.
        title: the picture's label, in brackets after "Original".
        prediction: the predicted class with its probability; drawn below.
        ink: the color of the prediction.
        layers: the layers' numbers. Default: 1 to L.
    """
    original = Panel(picture_HWC, f"Original ({title})" if title else "Original")
    caption = f"{prediction}\nbrightness: {SCALES['frame']}".strip()
    frames = []
    numbers = layers or range(1, len(rollout_LGJ) + 1)
    for number, mask_GJ in zip(
        numbers, normalize(reference_masks(rollout_LGJ), "frame"), strict=True
    ):
        picture_hw = picture_HWC.shape[:2]
        dimmed_HWC = dim(picture_HWC, place(mask_GJ, picture_hw, picture_hw, "squash"))
        panels = [original, Panel(dimmed_HWC, f"Rollout through layer {number}")]
        frames.append(compose([panels], caption=caption, ink=ink))
    return frames
