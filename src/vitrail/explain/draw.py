"""An explanation -> a picture or an animation, drawn by matplotlib.

A sheet is a matplotlib figure with 72 dots per inch, so that a point is a pixel: rows of panels,
a color bar and a caption at fixed places. In an animation nothing moves but the map.
"""

import base64
import csv
import html
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from PIL import Image
from torch import nn

from vitrail.config.settings import Config, Look, Normalization, require
from vitrail.data.images import ImageSet, normalize
from vitrail.data.pictures import Fit, seen_box
from vitrail.evaluation.metrics import evaluating
from vitrail.evaluation.report import drawable, save_figure
from vitrail.explain.animation import encode_animation
from vitrail.explain.explanation import CORRECT, WRONG, Explanation, Frame
from vitrail.explain.map_settings import MapSettings
from vitrail.explain.methods import compute_maps
from vitrail.explain.page import make_page, page_data
from vitrail.runtime.files import replace_file

SUFFIXES = (".gif", ".webp", ".png", ".svg", ".pdf", ".html", ".npz", ".csv")
ANIMATED = ("rollout", "layers", "training")
"""Kinds that a notebook shows animated; the others are grids or a single map."""
SCALES: dict[Normalization, str] = {
    "frame": "each map on its own scale, lowest to highest",
    "picture": "all maps on one scale, lowest to highest",
    "none": "unscaled values, clipped to 0 and 1",
}
"""How a normalization is described on the picture."""
DIVERGING = "RdBu_r"
"""Colors of maps with a sign: white at 0, red for the class, blue against it."""
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
TRAINING_IMAGES = 8
"""Number of images that are drawn during training."""


def save(explanation: Explanation, path: Path, look: Look) -> Path:
    """Write the format of the file's extension.

    An animation (.gif, .webp), a picture (.png, .svg, .pdf), a page (.html), or the numbers (.npz,
    .csv).

    Raises:
        ConfigError: another extension, or a look that the explanation does not support.
        OutputError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    require(suffix in SUFFIXES, f"{path}: give a file that ends in {', '.join(SUFFIXES)}")
    if suffix == ".html":
        require(look.style == "vitrail", "style reference is a picture or an animation, not a page")
        replace_file(path, make_page(page_data(explanation)))
    elif suffix in (".npz", ".csv"):
        replace_file(path, _to_numbers(explanation, suffix))
    elif suffix in (".png", ".svg", ".pdf"):
        replace_file(path, to_picture(explanation, look, suffix[1:]))
    else:
        replace_file(path, encode_animation(draw_frames(explanation, look), suffix, look))
    return path


def to_picture(explanation: Explanation, look: Look, kind: str = "png") -> bytes:
    """Return all frames on one sheet, as a file of this kind: png, svg or pdf."""
    file = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    draw_sheet(explanation, look).savefig(file, format=kind, metadata=undated)
    return file.getvalue()


def _to_numbers(explanation: Explanation, suffix: str) -> bytes:
    """Return the maps as numbers, not scaled: an archive of arrays, or a table.

    ``.npz`` has ``maps_FGJ`` and ``titles_F``; ``.csv`` one line per frame, row and column.
    """
    maps_FGJ, titles = explanation.maps_FGJ, explanation.titles
    if suffix == ".npz":
        file = io.BytesIO()
        np.savez_compressed(file, maps_FGJ=maps_FGJ, titles_F=np.array(titles))
        return file.getvalue()
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["frame", "title", "row", "column", "value"])
    for (f, row, column), value in np.ndenumerate(maps_FGJ):
        table.writerow([f, titles[f], row, column, value])
    return text.getvalue().encode()


def to_html(explanation: Explanation) -> str:
    """Return an image tag for a notebook, animated if the frames are a sequence."""
    if explanation.kind in ANIMATED and len(explanation.frames) > 1:
        frames = draw_frames(explanation, Look())
        kind, content = "gif", encode_animation(frames, ".gif", Look())
    else:
        kind, content = "png", to_picture(explanation, Look())
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(repr(explanation))}" src="data:image/{kind};base64,{data}">'


# What is on a sheet.


@dataclass(frozen=True)
class Panel:
    """The explained picture on a sheet; over it a map and the outline of a patch, if given."""

    title: str
    map_GJ: np.ndarray | None = None
    norm: Normalize | None = None
    """Scales the map to 0..1."""
    query: tuple[int, int] | None = None


def draw_frames(explanation: Explanation, look: Look) -> list[Image.Image]:
    """Draw each frame: the picture, and beside it the picture with the map over it."""
    drawn, first = [], _first_title(explanation, look)
    for frame, norm in zip(explanation.frames, _scales_of(explanation, look), strict=True):
        still = Panel(first, query=frame.query)
        moving = Panel(frame.title, frame.map_GJ, norm, frame.query)
        figure = _compose(explanation, look, [[still, moving]], last=frame, ends=norm)
        pixels = io.BytesIO()
        figure.savefig(pixels, format="rgba")
        size = figure.canvas.get_width_height()
        drawn.append(Image.frombytes("RGBA", size, pixels.getvalue()).convert("RGB"))
    return drawn


def draw_sheet(explanation: Explanation, look: Look) -> Figure:
    """Draw all frames on one sheet, the picture first."""
    frames, norms = explanation.frames, _scales_of(explanation, look)
    panels = [
        Panel(_short_title(explanation, frame), frame.map_GJ, norm, frame.query)
        for frame, norm in zip(frames, norms, strict=True)
    ]
    first = Panel(_first_title(explanation, look), query=frames[0].query)
    columns = explanation.columns or (len(frames) + 1 if len(frames) < 5 else 4)
    if explanation.columns:
        rows = [[first], *_in_rows(panels, columns)]
    else:
        rows = _in_rows([first, *panels], columns)
    own = look.normalize == "frame" and len(norms) > 1
    ends = Normalize(0, 1) if own and not all(f.signed for f in frames) else norms[0]
    return _compose(explanation, look, rows, last=frames[-1], ends=ends)


def _first_title(explanation: Explanation, look: Look) -> str:
    label = explanation.subject.label
    if look.style == "vitrail":
        return "picture"
    return f"Original ({label})" if label else "Original"


def _short_title(explanation: Explanation, frame: Frame) -> str:
    """Return a panel's title on a sheet, without what its row and position show."""
    if explanation.kind == "heads":
        return frame.title.partition(", ")[2]
    if explanation.kind == "training":
        return f"{frame.title}: {frame.prediction}"
    return "" if explanation.kind == "queries" else frame.title


def _in_rows(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    return [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]


def caption(explanation: Explanation) -> str:
    """Return what is shown: the picture, the method, its settings."""
    settings, subject = explanation.settings, explanation.subject
    method = "all methods" if explanation.kind == "methods" else settings.method
    parts = [f"{subject.name}: {method.replace('_', ' ')}"]
    if settings.fusion != "mean":
        parts.append(f"heads fused by {settings.fusion}")
    if settings.discard_ratio:
        parts.append(f"lowest {settings.discard_ratio:.0%} discarded")
    if settings.against is not None:
        parts.append(f"against {subject.classes[settings.against]}")
    if settings.method == "occlusion" and explanation.kind != "methods":
        parts.append(f"squares of {settings.window} x {settings.window} patches")
    if subject.label:
        parts.append(f"label: {subject.label}")
    return ", ".join(parts)


# Maps over pictures.


def _scales_of(explanation: Explanation, look: Look) -> list[Normalize]:
    signed = [frame.signed for frame in explanation.frames]
    return scales(explanation.maps_FGJ, look, signed)


def scales(maps_FGJ: np.ndarray, look: Look, signed: Sequence[bool] = ()) -> list[Normalize]:
    """Return what scales each map to 0..1: its own range, the common range, or only clipping.

    A uniform map has nothing to show: it becomes 0. In a signed map 0 is in the middle.
    """
    lows_F, highs_F = maps_FGJ.min((1, 2)), maps_FGJ.max((1, 2))
    if look.normalize == "picture":
        lows_F, highs_F = np.full_like(lows_F, lows_F.min()), np.full_like(highs_F, highs_F.max())
    elif look.normalize == "none":
        lows_F, highs_F = np.zeros_like(lows_F), np.ones_like(highs_F)
    return [
        CenteredNorm(0, float(max(-low, high)) or 1.0, clip=True)
        if centered
        else Normalize(float(low), float(high), clip=True)
        for low, high, centered in zip(
            lows_F, highs_F, signed or [False] * len(lows_F), strict=True
        )
    ]


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
        map_GJ: one value per patch.
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
    if map_GJ is not None:
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


def _compose(
    explanation: Explanation,
    look: Look,
    rows: Sequence[Sequence[Panel]],
    *,
    last: Frame,
    ends: Normalize,
) -> Figure:
    """Draw rows of panels on one sheet; below them a color bar and the caption of a frame.

    Nothing moves with the words: in an animation, only the map and the numbers change.
    """
    maps_rollout = explanation.kind == "rollout" and explanation.settings.method == "rollout"
    require(
        look.style == "vitrail" or maps_rollout,
        "style reference draws the rollout, layer by layer: leave out method and frames",
    )
    columns = max(map(len, rows))
    height, width = drawn_size(_picture(explanation, look)[0].shape[:2], columns)
    size = round(min(28, max(13, width / 21)))  # of the letters
    margin, gap = round(1.2 * size), size // 2
    band = round(1.7 * size) if any(panel.title for row in rows for panel in row) else 0
    left = margin + (2 * size if explanation.row_titles else 0)
    inside = max(left - margin + columns * (width + gap) - gap, 36 * size)
    notes = textwrap.fill(drawable(caption(explanation), 1000), 2 * inside // size)
    below = margin + len(rows) * (band + height + gap)
    sheet = _Sheet(inside + 2 * margin, below + (5 + notes.count("\n")) * size + margin)
    for r, row in enumerate(rows):
        y = margin + r * (band + height + gap) + band
        if r and explanation.row_titles:
            at, words = (margin + size, y + height / 2), explanation.row_titles[r - 1]
            sheet.text(*at, words, size=size, rotation=90, ha="center", va="center")
        for c, panel in enumerate(row):
            axes = sheet.axes(left + c * (width + gap), y, width, height)
            _draw_panel(axes, panel, explanation, look)
            title = drawable(panel.title, round(width / (0.6 * size)))
            axes.set_title(
                title, loc="left", y=1, size=size, pad=gap, color=BLACK, parse_math=False
            )
    sheet.text(margin, below + 3.8 * size, notes, size=0.8 * size, color=GRAY, va="top")
    headline = drawable(last.prediction, 100)
    letters = min(1.2 * size, 1.5 * inside / len(headline))
    ink = {True: GREEN, False: RED, None: BLACK}[last.correct]
    sheet.text(margin, below + 3.2 * size, headline, size=letters, weight="bold", color=ink)
    _draw_colorbar(sheet, look, ends, place=(margin, below + gap, 10 * size, 0.6 * size))
    return sheet.figure


def _draw_colorbar(
    sheet: _Sheet, look: Look, ends: Normalize, *, place: tuple[float, float, float, float]
) -> None:
    """Draw a color bar; beside it the values at its ends and how the maps are scaled."""
    x, y, width, height = place
    bar = sheet.axes(*place)
    signed = isinstance(ends, CenteredNorm)
    colors = "gray" if look.style == "reference" else DIVERGING if signed else look.colormap
    sheet.figure.colorbar(ScalarMappable(ends, colors), cax=bar, orientation="horizontal", ticks=[])
    bar.spines[:].set_visible(False)
    words = f"{ends.vmin:.3g} to {ends.vmax:.3g}   {SIGNS if signed else SCALES[look.normalize]}"
    sheet.text(x + 1.05 * width, y + height, words, size=1.3 * height)


def _draw_panel(axes: Axes, panel: Panel, explanation: Explanation, look: Look) -> None:
    """Draw the picture with the panel's map; outline the query, white between black."""
    picture_HWC, box = _picture(explanation, look)
    show_map(axes, picture_HWC, panel.map_GJ, look=look, norm=panel.norm, box=box)
    if panel.query is not None:
        (G, J), (left, top, right, bottom) = explanation.subject.model.config.grid_GJ, box
        height, width = (bottom - top) / G, (right - left) / J
        corner = (left + panel.query[1] * width, top + panel.query[0] * height)
        edge = Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=2)
        edge.set_path_effects([Stroke(linewidth=5, foreground="black"), Normal()])
        axes.add_patch(edge)


def _picture(
    explanation: Explanation, look: Look
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Return the picture to draw, and left, top, right, bottom of what the model saw of it.

    Style reference shows the model's own small pixels.
    """
    subject, reference = explanation.subject, look.style == "reference"
    picture_HWC = subject.raw_HWC if reference else subject.picture_HWC
    picture_hw = picture_HWC.shape[0], picture_HWC.shape[1]
    fit: Fit = "squash" if reference else subject.fit
    return picture_HWC, seen_box(picture_hw, subject.model.config.image_hw, fit)


# Pictures of a run: the same few images during training.


def choose_images(validation: ImageSet, every: int) -> ImageSet:
    """Return the images to draw: the same in every epoch, spread evenly over the split.

    Raises:
        ConfigError: pictures are wanted (``every`` is not 0), but there is no validation image.
    """
    require(
        not every or len(validation) > 0,
        "attention_epochs draws validation images: give validation_images",
    )
    spread_B = torch.linspace(0, max(0, len(validation) - 1), TRAINING_IMAGES).long().unique()
    return validation.take(spread_B[: len(validation)])


def draw_attention(model: nn.Module, images: ImageSet, config: Config, path: Path) -> None:
    """Draw each image with its label, and below it its attention rollout with the prediction.

    Raises:
        OutputError: the file cannot be written.
    """
    device = next(model.parameters()).device
    images_BCHW = normalize(images.raw_BCHW.to(device), config.data.mean, config.data.std)
    with evaluating(model):
        maps = compute_maps(model, images_BCHW, MapSettings(method="rollout"))  # type: ignore[arg-type]
    figure = Figure(figsize=(1.6 * len(images), 3.8), layout="constrained", facecolor="white")
    axes: Any = figure.subplots(2, len(images), squeeze=False)
    for column, guess in enumerate(maps.logits_BY.argmax(dim=1).tolist()):
        raw_HWC = images.raw_BCHW[column].permute(1, 2, 0).numpy()
        map_GJ = maps.values_BLGJ[column, -1].numpy()
        upper, lower = axes[:, column]
        show_map(upper, raw_HWC, look=Look())
        show_map(lower, raw_HWC, map_GJ, look=Look(style="reference"))
        label = int(images.labels_B[column])
        mark, ink = (CORRECT, GREEN) if guess == label else (WRONG, RED)
        upper.set_title(drawable(images.classes[label], 14), fontsize=9, parse_math=False)
        words = f"{mark} {drawable(images.classes[guess], 12)}"
        lower.set_title(words, fontsize=9, parse_math=False, color=ink)
    about = "Above: image and label. Below: attention rollout and prediction."
    figure.suptitle(textwrap.fill(about, 24 * len(images)), fontsize=9)
    save_figure(figure, path, dpi=80)
