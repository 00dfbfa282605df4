"""Pictures with maps over them, in rows on one sheet, drawn by matplotlib.

A sheet is a matplotlib figure with 72 dots per inch, so that a point is a pixel: rows of panels,
color bars and text at fixed places.
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

from vitrail.config.drawing import Look, Normalization
from vitrail.data.pictures import Fit, seen_box
from vitrail.evaluation.report import drawable
from vitrail.explain.explanation import Frame, Subject

SCALES: dict[Normalization, str] = {
    "frame": "each map on its own scale",
    "picture": "all maps on one scale",
    "none": "unscaled, clipped to 0 and 1",
}
"""How a normalization is described on the picture."""
DIVERGING = "RdBu_r"
"""Colors of maps with a sign: white at 0, red for the class, blue against it."""
RGB = LinearSegmentedColormap.from_list("rgb", ["#ff0000", "#00ff00", "#0000ff"])
COLORS = "similar colors: similar tokens (red, green, blue: principal components 1, 2, 3)"
SIGNS = "red: for the class, blue: against it"
EVEN = 1.1
"""Attention is nearly even if its highest value is at most this many times its lowest."""
LARGEST_SIDE = 1200
"""A picture's longer side is drawn with at most this many pixels."""
LARGEST_ROW = 1280
"""The pictures of a row are at most this many pixels wide together, to fit a web page."""
SMALLEST_SIDE = 384
"""A picture's longer side is drawn with at least this many pixels, if the row has the space."""
ZOOM = 0.5
"""If the model saw less than this fraction of a picture, maps are drawn on that part only."""
PAPER = {"light": "white", "dark": "#0d1117"}
BLACK, GRAY = {"light": "#1f2328", "dark": "#e6edf3"}, {"light": "#656d76", "dark": "#8b949e"}
"""Text, and less important text."""
RED, GREEN = {"light": "#b42318", "dark": "#ff7b72"}, {"light": "#1a7f37", "dark": "#3fb950"}
"""Text of a wrong and of a correct prediction."""
INKS = {True: GREEN, False: RED, None: BLACK}
UNSEEN = {"light": 224, "dark": 40}
"""Gray over pixels that the model did not see."""
UNSEEN_OPACITY = 0.7
_TITLE: dict[str, Any] = {"loc": "left", "y": 1, "parse_math": False}


@dataclass(frozen=True)
class Panel:
    """A picture on a sheet; over it a map and the outline of a patch, if given."""

    subject: Subject
    title: str
    map_GJ: np.ndarray | None = None
    norm: Normalize | None = None
    """Scales the map to 0..1."""
    query: tuple[int, int] | None = None
    correct: bool | None = None
    """Whether the prediction in the title is right; None if there is none, or it is not known."""


class Legend(NamedTuple):
    """A color bar and the words beside it."""

    ends: Normalize
    colormap: Colormap | str
    words: str


# Maps over pictures.


def scales(
    maps: Sequence[np.ndarray] | np.ndarray,
    look: Look,
    signed: Sequence[bool] = (),
    *,
    shares: bool = False,
) -> list[Normalize]:
    """Return norms that scale each map to 0..1 by its own range, a common range, or clipping only.

    A uniform map has nothing to show: it becomes 0. Nearly even attention (``shares``: values that
    sum to 1) is drawn in the middle of the scale: stretched to its own range, noise would look like
    a finding. In a signed map 0 is in the middle. Colors (G, J, 3) are not scaled.
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
        elif shares and look.normalize == "frame" and _is_even(low, high):
            low, high = (low + high) / 2 / EVEN, (low + high) / 2 * EVEN
        if centered:
            reach = 1.0 if look.normalize == "none" else max(-low, high) or 1.0
            found.append(CenteredNorm(0, reach, clip=True))
        else:
            found.append(Normalize(low, high, clip=True))
    return found


def _is_even(low: float, high: float) -> bool:
    return 0 < low < high <= EVEN * low


def make_legends(
    frames: Sequence[Frame], norms: Sequence[Normalize], look: Look, *, shares: bool = False
) -> list[Legend]:
    """Return a color bar for each kind of map: without a sign, with one, and colors."""
    kinds: dict[str, list[tuple[Frame, Normalize]]] = {}
    for frame, norm in zip(frames, norms, strict=True):
        signed = "signed" if isinstance(norm, CenteredNorm) else "unsigned"
        kinds.setdefault("colors" if frame.map_GJ.ndim == 3 else signed, []).append((frame, norm))
    found = []
    for kind, pairs in kinds.items():
        norm = pairs[0][1]
        if kind == "colors":
            found.append(Legend(norm, RGB, COLORS))
            continue
        colors = DIVERGING if kind == "signed" else look.colormap
        colors = "gray" if look.style == "reference" else colors
        words = _describe_scale(pairs, look, shares=shares)
        found.append(Legend(norm, colors, words))
    return found


def _describe_scale(pairs: Sequence[tuple[Frame, Normalize]], look: Look, *, shares: bool) -> str:
    """Return what the ends of a color bar mean, and how many maps are nearly even."""
    norm = pairs[0][1]
    even = 0
    if shares and look.normalize == "frame":
        even = sum(_is_even(float(f.map_GJ.min()), float(f.map_GJ.max())) for f, _ in pairs)
    if len(pairs) == even == 1:
        map_GJ = pairs[0][0].map_GJ
        times = map_GJ.max() / map_GJ.min()
        return f"nearly even: the highest value is {times:.2f} times the lowest"
    signed = isinstance(norm, CenteredNorm)
    tiny = not shares and max(abs(norm.vmin or 0), abs(norm.vmax or 0)) < 0.001
    if tiny or len({(each.vmin, each.vmax) for _, each in pairs}) > 1:
        ends = SIGNS if signed else "lowest to highest"
    else:
        low, high = (f"{end:.2%}" if shares else f"{end:.3g}" for end in (norm.vmin, norm.vmax))
        what = " of the attention" if shares else f", {SIGNS}" if signed else ""
        ends = f"{low} to {high}{what}"
    note = f"; {even} of {len(pairs)} nearly even" if even else ""
    return f"{ends}, {SCALES[look.normalize]}{note}"


def show_map(
    axes: Axes,
    picture_HWC: np.ndarray,
    map_GJ: np.ndarray | None = None,
    *,
    look: Look,
    norm: Normalize | None = None,
    box: tuple[float, float, float, float] | None = None,
) -> None:
    """Show a picture, and over it a map, interpolated between the centers of the patches.

    Cubic interpolation (Catmull-Rom, clipped to the scale) makes round spots where bilinear makes
    stars. The picture is gray under a map, since its hues would mix with the map's. The part that
    the model did not see has no map and is grayed out.

    Args:
        axes: where to draw.
        picture_HWC: uint8, one or three channels.
        map_GJ: one value or color per patch.
        look: style reference multiplies the picture by the map, with bilinear interpolation.
        norm: scales the map; a centered one has colors for both signs. Default: its own range.
        box: left, top, right, bottom of what the model saw. Default: all.
    """
    height, width = picture_HWC.shape[:2]
    left, top, right, bottom = box or (0, 0, width, height)
    rgb_HWC = np.broadcast_to(picture_HWC, (height, width, 3))
    if map_GJ is not None and look.style == "vitrail":
        gray_HW = np.asarray(Image.fromarray(rgb_HWC).convert("L"), np.float32)
        seen_HW = np.zeros((height, width), dtype=bool)
        rows = slice(max(0, math.ceil(top)), math.floor(bottom))
        seen_HW[rows, max(0, math.ceil(left)) : math.floor(right)] = True
        veiled_HW = gray_HW + UNSEEN_OPACITY * (UNSEEN[look.theme] - gray_HW)
        shown_HW = np.where(seen_HW, gray_HW, veiled_HW)
        rgb_HWC = shown_HW.round().astype(np.uint8)[:, :, None].repeat(3, axis=2)
    axes.imshow(rgb_HWC, extent=(0, width, height, 0))
    if map_GJ is not None and map_GJ.ndim == 3:
        axes.imshow(
            map_GJ, extent=(left, right, bottom, top), interpolation="catrom",
            alpha=1 - (1 - look.alpha) ** 3,
        )  # fmt: skip
    elif map_GJ is not None:
        colors = _translucent(look, norm)
        axes.imshow(
            map_GJ, colors, norm or Normalize(clip=True), extent=(left, right, bottom, top),
            interpolation="catrom" if look.style == "vitrail" else "bilinear",
            interpolation_stage="data",
        )  # fmt: skip
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axes.set_axis_off()


def _translucent(look: Look, norm: Normalize | None) -> ListedColormap:
    """Return the colors that are laid over the picture.

    The opacity rises with the map: high values show the color, low ones the picture; with a sign,
    large values of both signs do. In style reference it is black, and falls with the map.
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


def drawn_size(picture_hw: tuple[float, float], columns: int) -> tuple[int, int]:
    """Return height and width in pixels of a picture that is one of ``columns`` side by side.

    A small one is enlarged by an integer factor, its pixels kept as squares; a large one is
    reduced.
    """
    longer, largest = max(picture_hw), min(LARGEST_SIDE, LARGEST_ROW // columns)
    smallest = min(SMALLEST_SIDE, largest)
    factor = min(math.ceil(smallest / longer), largest // longer) or largest / longer
    return max(1, round(picture_hw[0] * factor)), max(1, round(picture_hw[1] * factor))


class _Sheet:
    """A figure whose positions are in pixels from the top left."""

    def __init__(self, width: int, height: int, look: Look) -> None:
        self.width, self.height, self.look = width, height, look
        self.figure = Figure((width / 72, height / 72), dpi=72, facecolor=PAPER[look.theme])

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Add axes."""
        bottom = self.height - y - height
        return self.figure.add_axes(
            (x / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write text above and to the right of a position, or aligned by ``style``."""
        at = x / self.width, 1 - y / self.height
        self.figure.text(*at, text, parse_math=False, **{"color": BLACK[self.look.theme], **style})


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

    If one picture has the first row to itself, these are on its right, if there is space. Titles
    and predictions do not affect the layout: in an animation, only the map and the text change.
    """
    sizes = _panel_sizes(rows, look)
    widths = _column_widths(sizes)
    size = round(min(22, max(13, sum(widths) / 50)))  # of the font
    margin, gap = round(1.2 * size), size // 2
    left = margin + (2 * size if row_titles else 0)
    right = max(left + sum(widths) + gap * (len(widths) - 1), margin + 34 * size)
    beside = left + sizes[0][0][1] + 2 * size
    under = len(rows) == 1 or len(rows[0]) > 1 or right - beside < 40 * size
    at = margin if under else beside
    notes = textwrap.fill(drawable(notes, 1000), int(1.9 * (right - at) / size))
    tall = round((1.7 * len(legends) + (2.1 if last else 0.3) + notes.count("\n") + 1) * size)
    tops = [margin]
    for row, row_sizes in zip(rows, sizes, strict=True):
        band = round(1.7 * size) if any(panel.title for panel in row) else 0
        tops.append(tops[-1] + band + max(height for height, _ in row_sizes) + gap)
    sheet = _Sheet(right + margin, tops[-1] + (tall if under else 0) + margin, look)
    for number, (row, row_sizes) in enumerate(zip(rows, sizes, strict=True)):
        x, bottom, high = left, tops[number + 1] - gap, max(height for height, _ in row_sizes)
        if row_titles and row_titles[number]:
            title = drawable(row_titles[number], round(high / (0.6 * size)))
            place = margin + size, bottom - high / 2
            sheet.text(*place, title, size=size, rotation=90, ha="center", va="center")
        for panel, (height, width), step in zip(row, row_sizes, widths, strict=False):
            axes = sheet.axes(x, bottom - height, width, height)
            _draw_panel(axes, panel, look, zoomed=_is_zoomed(panel, rows, look))
            title = drawable(panel.title, round(width / (0.53 * size)))
            if panel.norm is not None:
                title = title[:1].upper() + title[1:]
            ink = INKS[panel.correct][look.theme]
            axes.set_title(title, size=size, pad=gap, color=ink, **_TITLE)
            x += step + gap
    top = tops[-1] if under else tops[1] - gap - tall
    _draw_words(sheet, (at, top, right - at), size, legends=legends, last=last, notes=notes)
    return sheet.figure


def _panel_sizes(rows: Sequence[Sequence[Panel]], look: Look) -> list[list[tuple[int, int]]]:
    """Return height and width in pixels of each panel; the longer side of all is the same."""
    columns = max(map(len, rows))

    def size_of(panel: Panel) -> tuple[int, int]:
        picture_HWC, (left, top, right, bottom) = _picture(panel.subject, look)
        if panel.norm is not None and _is_zoomed(panel, rows, look):
            return drawn_size((bottom - top, right - left), columns)
        return drawn_size((picture_HWC.shape[0], picture_HWC.shape[1]), columns)

    sizes = [[size_of(panel) for panel in row] for row in rows]
    longer = min(max(size) for row in sizes for size in row)
    return [
        [(max(1, round(high * longer / max(high, wide))), round(wide * longer / max(high, wide)))
         for high, wide in row]
        for row in sizes
    ]  # fmt: skip


def _column_widths(sizes: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
    """Return the width of each column; a picture alone in its row may be wider than its column."""
    full = [row for row in sizes if len(row) > 1] or list(sizes)
    return [max(width for _, width in filter(None, row)) for row in itertools.zip_longest(*full)]


def _is_zoomed(panel: Panel, rows: Sequence[Sequence[Panel]], look: Look) -> bool:
    """Return whether maps are drawn only on the part of the picture that the model saw.

    They are in grids, which have little space, and where the model saw only a small part.
    """
    picture_HWC, (left, top, right, bottom) = _picture(panel.subject, look)
    seen = (right - left) * (bottom - top) / (picture_HWC.shape[0] * picture_HWC.shape[1])
    return seen < ZOOM or (seen < 1 and len(rows) > 1 and len(rows[0]) == 1)


def _draw_words(
    sheet: _Sheet,
    place: tuple[float, float, float],
    size: int,
    *,
    legends: Sequence[Legend],
    last: Frame | None,
    notes: str,
) -> None:
    """Draw color bars with labels, the prediction and notes; ``place``: x, y and width."""
    look, (x, y, width) = sheet.look, place
    for legend in legends:
        bar = sheet.axes(x, y + 0.5 * size, 8 * size, 0.7 * size)
        shown = ScalarMappable(legend.ends, legend.colormap)
        sheet.figure.colorbar(shown, cax=bar, orientation="horizontal", ticks=[])
        bar.spines[:].set_visible(False)
        letters = min(0.9 * size, 1.75 * (width - 8.5 * size) / len(legend.words))
        sheet.text(x + 8.5 * size, y + 1.2 * size, legend.words, size=letters)
        y += 1.7 * size
    if last is not None and last.prediction:  # a network without classes predicts nothing
        headline = drawable(last.prediction, 100)
        letters = min(1.2 * size, 1.5 * width / len(headline))
        ink = INKS[last.correct][look.theme]
        sheet.text(x, y + 1.5 * size, headline, size=letters, weight="bold", color=ink)
    y += (2.1 if last and last.prediction else 0.3) * size
    sheet.text(x, y, notes, size=0.8 * size, color=GRAY[look.theme], va="top")


def _draw_panel(axes: Axes, panel: Panel, look: Look, *, zoomed: bool) -> None:
    """Draw the picture with the panel's map; outline the query, or what the model saw."""
    picture_HWC, box = _picture(panel.subject, look)
    show_map(axes, picture_HWC, panel.map_GJ, look=look, norm=panel.norm, box=box)
    left, top, right, bottom = box
    if zoomed and panel.norm is None:
        _outline(axes, box)
    elif zoomed:
        axes.set(xlim=(left, right), ylim=(bottom, top))
    if panel.query is not None:
        G, J = panel.subject.model.config.grid_GJ
        height, width = (bottom - top) / G, (right - left) / J
        x, y = left + panel.query[1] * width, top + panel.query[0] * height
        _outline(axes, (x, y, x + width, y + height))


def _outline(axes: Axes, box: tuple[float, float, float, float]) -> None:
    """Draw a white rectangle with black edges."""
    left, top, right, bottom = box
    edge = Rectangle((left, top), right - left, bottom - top, fill=False, ec="white", linewidth=2)
    edge.set_path_effects([Stroke(linewidth=4.5, foreground="black"), Normal()])
    axes.add_patch(edge)


def _picture(subject: Subject, look: Look) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Return the picture to draw, and left, top, right, bottom of what the model saw of it.

    Style reference shows the picture at the model's resolution.
    """
    reference = look.style == "reference"
    picture_HWC = subject.raw_HWC if reference else subject.picture_HWC
    picture_hw = picture_HWC.shape[0], picture_HWC.shape[1]
    fit: Fit = "squash" if reference else subject.fit
    return picture_HWC, seen_box(picture_hw, subject.model.config.image_hw, fit)
