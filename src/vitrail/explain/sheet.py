"""Pictures with maps over them, in rows on one sheet, drawn by matplotlib.

A sheet is a matplotlib figure with 72 dots per inch, so that a point is a pixel: rows of panels,
color bars and words at fixed places.
"""

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import (
    CenteredNorm,
    Colormap,
    LinearSegmentedColormap,
    ListedColormap,
    Normalize,
)
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

from vitrail.config.settings import Look, Normalization
from vitrail.data.pictures import Fit, seen_box
from vitrail.evaluation.report import drawable
from vitrail.explain.explanation import Frame, Subject

SCALES: dict[Normalization, str] = {
    "frame": "each map on its own scale, lowest to highest",
    "picture": "all maps on one scale, lowest to highest",
    "none": "unscaled values, clipped to 0 and 1",
}
"""How a normalization is described on the picture."""
DIVERGING = "RdBu_r"
"""Colors of maps with a sign: white at 0, red for the class, blue against it."""
RGB = LinearSegmentedColormap.from_list("rgb", ["#ff0000", "#00ff00", "#0000ff"])
COLORS = "similar colors: similar tokens (red, green, blue: principal components 1, 2, 3)"
SIGNS = "white: 0, red: for the class, blue: against it"
LARGEST_SIDE = 1200
"""A picture's longer side is drawn with at most this many pixels."""
LARGEST_ROW = 2400
"""The pictures of a row have at most this many pixels together, if each has SMALLEST_SIDE."""
SMALLEST_SIDE = 224
"""A picture's longer side is drawn with at least this many pixels."""
UNSEEN_OPACITY = 0.7
"""Opacity of the light gray over pixels that the model did not see."""
BLACK, GRAY = "#1f2328", "#656d76"
"""Text, and less important text."""
RED, GREEN = "#b42318", "#1a7f37"
"""Text of a wrong and of a correct answer."""
_TITLE: dict[str, Any] = {"loc": "left", "y": 1, "parse_math": False}
INKS = {True: GREEN, False: RED, None: BLACK}


@dataclass(frozen=True)
class Panel:
    """A picture on a sheet; over it a map and the outline of a patch, if given."""

    subject: Subject
    title: str
    map_GJ: np.ndarray | None = None
    norm: Normalize | None = None
    """Scales the map to 0..1."""
    query: tuple[int, int] | None = None
    ink: str = BLACK
    """Color of the title."""


class Legend(NamedTuple):
    """A color bar and the words beside it."""

    ends: Normalize
    colormap: Colormap | str
    words: str


# Maps over pictures.


def scales_of(frames: Sequence[Frame], look: Look) -> list[Normalize]:
    """Return what scales the map of each frame to 0..1."""
    maps = [frame.map_GJ for frame in frames]
    return scales(maps, look, [frame.signed for frame in frames])


def scales(
    maps: Sequence[np.ndarray] | np.ndarray, look: Look, signed: Sequence[bool] = ()
) -> list[Normalize]:
    """Return what scales each map to 0..1: its own range, the common range, or only clipping.

    A uniform map has nothing to show: it becomes 0. In a signed map 0 is in the middle. Colors
    (G, J, 3) are not scaled.
    """
    lows, highs = [float(each.min()) for each in maps], [float(each.max()) for each in maps]
    numbers = [each.ndim == 2 for each in maps]
    if look.normalize == "picture" and any(numbers):
        lows = [min(itertools.compress(lows, numbers))] * len(lows)
        highs = [max(itertools.compress(highs, numbers))] * len(highs)
    found: list[Normalize] = []
    for low, high, number, centered in zip(
        lows, highs, numbers, signed or [False] * len(lows), strict=True
    ):
        if not number or (look.normalize == "none" and not centered):
            low, high = 0.0, 1.0
        if centered:
            reach = 1.0 if look.normalize == "none" else max(-low, high) or 1.0
            found.append(CenteredNorm(0, reach, clip=True))
        else:
            found.append(Normalize(low, high, clip=True))
    return found


def make_legends(frames: Sequence[Frame], norms: Sequence[Normalize], look: Look) -> list[Legend]:
    """Return a color bar for each kind of map: without a sign, with one, and colors.

    Maps on different scales have a bar from 0 to 1, or from -1 to 1.
    """
    found: dict[str, Legend] = {}
    for frame, norm in zip(frames, norms, strict=True):
        if frame.map_GJ.ndim == 3:
            found["colors"] = Legend(norm, RGB, COLORS)
            continue
        signed = isinstance(norm, CenteredNorm)
        kind, words = ("signed", SIGNS) if signed else ("unsigned", SCALES[look.normalize])
        colors = DIVERGING if signed else look.colormap
        colors = "gray" if look.style == "reference" else colors
        if kind in found and _ends(found[kind].ends) != _ends(norm):
            norm = CenteredNorm(0, 1) if signed else Normalize(0, 1)
            words = f"{SIGNS}; each map on its own scale" if signed else words
        elif kind in found:
            words = found[kind].words
        found[kind] = Legend(norm, colors, words)
    return list(found.values())


def _ends(norm: Normalize) -> tuple[float | None, float | None]:
    return norm.vmin, norm.vmax


def show_map(
    axes: Axes,
    picture_HWC: np.ndarray,
    map_GJ: np.ndarray | None = None,
    *,
    look: Look,
    norm: Normalize | None = None,
    box: tuple[float, float, float, float] | None = None,
) -> None:
    """Show a picture, and over it a map: bilinear between the centers of the patches.

    The picture is gray under colors, since its hues would mix with the map's. What the model did
    not see of it has no map and is covered with light gray.

    Args:
        axes: where to draw.
        picture_HWC: bytes, of one or three channels.
        map_GJ: one value or color per patch.
        look: style reference draws the picture x the map instead of colors.
        norm: scales the map; a centered one is drawn in colors for both signs. Default: its own
            range.
        box: left, top, right, bottom of what the model saw. Default: all.
    """
    height, width = picture_HWC.shape[:2]
    left, top, right, bottom = box or (0, 0, width, height)
    rgb_HWC = np.broadcast_to(picture_HWC, (height, width, 3))
    if map_GJ is not None and look.style == "vitrail":
        gray_HW = np.asarray(Image.fromarray(rgb_HWC).convert("L"), np.float32)
        seen_HW = np.zeros((height, width), dtype=bool)
        seen_HW[max(0, round(top)) : round(bottom), max(0, round(left)) : round(right)] = True
        shown_HW = np.where(seen_HW, gray_HW, gray_HW + UNSEEN_OPACITY * (224 - gray_HW))
        rgb_HWC = shown_HW.round().astype(np.uint8)[:, :, None].repeat(3, axis=2)
    axes.imshow(rgb_HWC, extent=(0, width, height, 0))
    if map_GJ is not None and map_GJ.ndim == 3:
        axes.imshow(
            map_GJ, extent=(left, right, bottom, top), interpolation="bilinear",
            alpha=1 - (1 - look.alpha) ** 3,
        )  # fmt: skip
    elif map_GJ is not None:
        colors = _translucent(look, norm)
        axes.imshow(
            map_GJ, colors, norm or Normalize(), extent=(left, right, bottom, top),
            interpolation="bilinear", interpolation_stage="data",
        )  # fmt: skip
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axes.set_axis_off()


def _translucent(look: Look, norm: Normalize | None) -> ListedColormap:
    """Return the colors that are laid over the picture.

    The opacity rises with the map: high values show the color, low ones the picture; with a sign,
    large values of both signs do. In style reference it is black that falls with the map.
    """
    level_K = np.linspace(0, 1, 256)
    if look.style == "reference":
        return ListedColormap(np.outer(1 - level_K, (0, 0, 0, 1)))
    if isinstance(norm, CenteredNorm):
        colors_K4 = matplotlib.colormaps[DIVERGING](level_K)
        level_K = abs(2 * level_K - 1) ** 0.5
    else:
        colors_K4 = matplotlib.colormaps[look.colormap](level_K)
    colors_K4[:, 3] = look.alpha * (1 + (1 - look.alpha) * level_K)
    return ListedColormap(colors_K4)


# The sheet.


def drawn_size(picture_hw: tuple[int, int], columns: int) -> tuple[int, int]:
    """Return height and width in pixels of a picture that is one of ``columns`` side by side.

    A small one is enlarged by an integer factor, its pixels kept as squares; a large one is
    reduced.
    """
    longer, smallest = max(picture_hw), {1: 384, 2: 384, 3: 288}.get(columns, SMALLEST_SIDE)
    largest = min(LARGEST_SIDE, max(smallest, LARGEST_ROW // columns))
    factor = min(math.ceil(smallest / longer), largest // longer) or largest / longer
    return max(1, round(picture_hw[0] * factor)), max(1, round(picture_hw[1] * factor))


class _Sheet:
    """A white figure on which places are in pixels from the top left."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure((width / 72, height / 72), dpi=72, facecolor="white")

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Add axes."""
        bottom = self.height - y - height
        return self.figure.add_axes(
            (x / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text above and to the right of a place, or as ``style`` says."""
        at = x / self.width, 1 - y / self.height
        self.figure.text(*at, text, parse_math=False, **{"color": BLACK, **style})


def compose(
    rows: Sequence[Sequence[Panel]],
    look: Look,
    *,
    legends: Sequence[Legend],
    notes: str,
    last: Frame | None = None,
    row_titles: Sequence[str] = (),
) -> Figure:
    """Draw rows of panels on one sheet; below them color bars, a frame's prediction and notes.

    Nothing moves with the words: in an animation, only the map and the numbers change.
    """
    columns = max(map(len, rows))
    drawn = _drawn_sizes(rows, look)
    width = max(wide for row in drawn for _, wide in row)
    size = round(min(28, max(13, width / 21, min(16, columns * width / 140))))  # of the letters
    margin, gap = round(1.2 * size), size // 2
    band = round(1.7 * size) if any(panel.title for row in rows for panel in row) else 0
    left = margin + (2 * size if row_titles else 0)
    inside = max(left - margin + columns * (width + gap) - gap, 36 * size)
    notes = textwrap.fill(drawable(notes, 1000), 2 * inside // size)
    below = margin + sum(max(high for high, _ in row) + band + gap for row in drawn)
    words = below + round((0.9 + 1.1 * len(legends)) * size)
    end = words + round((3 if last else 1.8) * size) + notes.count("\n") * size
    sheet = _Sheet(inside + 2 * margin, end + margin)
    y: float = margin
    for r, (row, sizes) in enumerate(zip(rows, drawn, strict=True)):
        y, height = y + band, max(high for high, _ in sizes)
        if row_titles and row_titles[r]:
            title = drawable(row_titles[r], round(height / (0.6 * size)))
            at = margin + size, y + height / 2
            sheet.text(*at, title, size=size, rotation=90, ha="center", va="center")
        for c, (panel, (high, wide)) in enumerate(zip(row, sizes, strict=True)):
            axes = sheet.axes(left + c * (width + gap), y, wide, high)
            _draw_panel(axes, panel, look)
            title = drawable(panel.title, round(width / (0.6 * size)))
            axes.set_title(title, size=size, pad=gap, color=panel.ink, **_TITLE)
        y += height + gap
    for number, legend in enumerate(legends):
        top = below + gap + round(1.1 * number * size)
        _draw_legend(sheet, legend, place=(margin, top, 10 * size, 0.6 * size))
    if last is not None:
        headline = drawable(last.prediction, 100)
        letters = min(1.2 * size, 1.5 * inside / len(headline))
        sheet.text(margin, words + 1.2 * size, headline, size=letters, weight="bold",
                   color=INKS[last.correct])  # fmt: skip
    top = words + round((1.8 if last else 0.6) * size)
    sheet.text(margin, top, notes, size=0.8 * size, color=GRAY, va="top")
    return sheet.figure


def _draw_legend(
    sheet: _Sheet, legend: Legend, *, place: tuple[float, float, float, float]
) -> None:
    """Draw a color bar; beside it the values at its ends and what it means."""
    (x, y, width, height), ends = place, legend.ends
    bar = sheet.axes(*place)
    shown = ScalarMappable(ends, legend.colormap)
    sheet.figure.colorbar(shown, cax=bar, orientation="horizontal", ticks=[])
    bar.spines[:].set_visible(False)
    values = "" if legend.colormap is RGB else f"{ends.vmin:.3g} to {ends.vmax:.3g}   "
    sheet.text(x + 1.05 * width, y + height, values + legend.words, size=1.3 * height)


def _draw_panel(axes: Axes, panel: Panel, look: Look) -> None:
    """Draw the picture with the panel's map; outline the query, white between black."""
    picture_HWC, box = _picture(panel.subject, look)
    show_map(axes, picture_HWC, panel.map_GJ, look=look, norm=panel.norm, box=box)
    if panel.query is not None:
        (G, J), (left, top, right, bottom) = panel.subject.model.config.grid_GJ, box
        height, width = (bottom - top) / G, (right - left) / J
        corner = (left + panel.query[1] * width, top + panel.query[0] * height)
        edge = Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=2)
        edge.set_path_effects([Stroke(linewidth=5, foreground="black"), Normal()])
        axes.add_patch(edge)


def _drawn_sizes(rows: Sequence[Sequence[Panel]], look: Look) -> list[list[tuple[int, int]]]:
    """Return height and width in pixels of each panel; the longer side of all is the same."""
    columns = max(map(len, rows))
    shapes = [[_picture(panel.subject, look)[0].shape for panel in row] for row in rows]
    sizes = [[drawn_size((high, wide), columns) for high, wide, _ in row] for row in shapes]
    longer = min(max(size) for row in sizes for size in row)
    return [
        [(round(high * longer / max(high, wide)), round(wide * longer / max(high, wide)))
         for high, wide in row]
        for row in sizes
    ]  # fmt: skip


def _picture(subject: Subject, look: Look) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Return the picture to draw, and left, top, right, bottom of what the model saw of it.

    Style reference shows the model's own small pixels.
    """
    reference = look.style == "reference"
    picture_HWC = subject.raw_HWC if reference else subject.picture_HWC
    picture_hw = picture_HWC.shape[0], picture_HWC.shape[1]
    fit: Fit = "squash" if reference else subject.fit
    return picture_HWC, seen_box(picture_hw, subject.model.config.image_hw, fit)
