"""An explanation -> a picture, an animation, a page or a file of numbers.

In an animation nothing moves but the map.
"""

import base64
import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from vitrail.config.settings import Look, require
from vitrail.explain.animation import encode_animation
from vitrail.explain.explanation import Explanation, Frame
from vitrail.explain.page import make_page, page_data
from vitrail.explain.sheet import INKS, Panel, compose, make_legends, scales_of
from vitrail.runtime.files import replace_file

SUFFIXES = (".gif", ".webp", ".png", ".svg", ".pdf", ".html", ".npz", ".csv")
PICTURES = (".png", ".svg", ".pdf")
ANIMATED = ("rollout", "layers", "training")
"""Kinds that a notebook shows animated; the others are grids or a single map."""
MOST_ROWS = 50
"""Most pictures on one sheet."""


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
    elif suffix in PICTURES:
        replace_file(path, to_picture(explanation, look, suffix[1:]))
    else:
        replace_file(path, encode_animation(draw_frames(explanation, look), suffix, look))
    return path


def save_table(explanations: Sequence[Explanation], path: Path, look: Look) -> Path:
    """Write ``draw_table`` of several pictures as .png, .svg or .pdf.

    Raises:
        ConfigError: another extension, or too many pictures.
        OutputError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    require(suffix in PICTURES, f"{path}: give a file that ends in {', '.join(PICTURES)}")
    replace_file(path, _encode(draw_table(explanations, look), suffix[1:]))
    return path


def check_rows(n_pictures: int) -> None:
    """Refuse a sheet of too many pictures.

    Raises:
        ConfigError: there are more than MOST_ROWS.
    """
    require(
        n_pictures <= MOST_ROWS,
        f"{n_pictures} pictures do not fit on one sheet: give at most {MOST_ROWS}, or --format gif "
        "for a file each",
    )


def to_picture(explanation: Explanation, look: Look, kind: str = "png") -> bytes:
    """Return all frames on one sheet, as a file of this kind: png, svg or pdf."""
    return _encode(draw_sheet(explanation, look), kind)


def _encode(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file of this kind, without a date."""
    file = io.BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    figure.savefig(file, format=kind, metadata=undated)
    return file.getvalue()


def _to_numbers(explanation: Explanation, suffix: str) -> bytes:
    """Return the maps as numbers, not scaled: an archive of arrays, or a table.

    ``.npz`` has ``maps_FGJ`` and ``titles_F``; ``.csv`` one line per frame, row and column, and
    per channel of a color.
    """
    maps_FGJ, titles = explanation.maps_FGJ, explanation.titles
    if suffix == ".npz":
        file = io.BytesIO()
        np.savez_compressed(file, maps_FGJ=maps_FGJ, titles_F=np.array(titles))
        return file.getvalue()
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    place = ["row", "column", "channel"][: maps_FGJ.ndim - 1]
    table.writerow(["frame", "title", *place, "value"])
    for (f, *at), value in np.ndenumerate(maps_FGJ):
        table.writerow([f, titles[f], *at, value])
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


def draw_frames(explanation: Explanation, look: Look) -> list[Image.Image]:
    """Draw each frame: the picture, and beside it the picture with the map over it."""
    _check_style(explanation, look)
    subject, first, drawn = explanation.subject, _first_title(explanation, look), []
    for frame, norm in zip(explanation.frames, scales_of(explanation.frames, look), strict=True):
        still = Panel(subject, first, query=frame.query)
        moving = Panel(subject, frame.title, frame.map_GJ, norm, frame.query)
        legends = make_legends([frame], [norm], look)
        figure = compose(
            [[still, moving]], look, legends=legends, notes=caption(explanation), last=frame
        )
        pixels = io.BytesIO()
        figure.savefig(pixels, format="rgba")
        size = figure.canvas.get_width_height()
        drawn.append(Image.frombytes("RGBA", size, pixels.getvalue()).convert("RGB"))
    return drawn


def draw_sheet(explanation: Explanation, look: Look) -> Figure:
    """Draw all frames on one sheet, the picture first."""
    _check_style(explanation, look)
    frames, norms = explanation.frames, scales_of(explanation.frames, look)
    panels = [
        Panel(
            explanation.subject, _short_title(explanation, frame), frame.map_GJ, norm, frame.query
        )
        for frame, norm in zip(frames, norms, strict=True)
    ]
    first = Panel(explanation.subject, _first_title(explanation, look), query=frames[0].query)
    columns = explanation.columns or (len(frames) + 1 if len(frames) < 5 else 4)
    if explanation.columns:
        rows = [[first], *_in_rows(panels, columns)]
    else:
        rows = _in_rows([first, *panels], columns)
    return compose(
        rows,
        look,
        legends=make_legends(frames, norms, look),
        notes=caption(explanation),
        last=frames[-1],
        row_titles=("", *explanation.row_titles) if explanation.row_titles else (),
    )


def draw_table(explanations: Sequence[Explanation], look: Look) -> Figure:
    """Draw a row per picture and a column per frame (method), the picture first.

    Raises:
        ConfigError: too many pictures for one sheet.
    """
    check_rows(len(explanations))
    rows: list[list[Panel]] = []
    frames: list[Frame] = []
    norms: list[Normalize] = []
    for explanation in explanations:
        _check_style(explanation, look)
        subject, scaled = explanation.subject, scales_of(explanation.frames, look)
        last = explanation.frames[-1]
        panels = [
            Panel(subject, frame.title, frame.map_GJ, norm, frame.query)
            for frame, norm in zip(explanation.frames, scaled, strict=True)
        ]
        rows.append([Panel(subject, last.prediction, ink=INKS[last.correct]), *panels])
        frames += explanation.frames
        norms += scaled
    return compose(
        rows,
        look,
        legends=make_legends(frames, norms, look),
        notes=f"{len(explanations)} pictures: {caption(explanations[0], table=True)}",
        row_titles=[explanation.subject.name for explanation in explanations],
    )


def _check_style(explanation: Explanation, look: Look) -> None:
    """Refuse to draw anything but a rollout as the reference implementation does."""
    maps_rollout = explanation.kind == "rollout" and explanation.settings.method == "rollout"
    require(
        look.style == "vitrail" or maps_rollout,
        "style reference draws the rollout, layer by layer: leave out method and frames",
    )


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
    if explanation.settings.method in ("similarity", "norms") and explanation.kind == "layers":
        return f"{frame.title}: {frame.map_GJ.min():.3g} to {frame.map_GJ.max():.3g}"
    return "" if explanation.kind == "queries" else frame.title


def _in_rows(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    return [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]


def caption(explanation: Explanation, *, table: bool = False) -> str:
    """Return what is shown: the picture (not for a table of several), the method, its settings."""
    settings, subject = explanation.settings, explanation.subject
    method = explanation.about.replace("_", " ")
    parts = [method if table else f"{subject.name}: {method}"]
    if settings.method == "features" and subject.basis is not None:
        parts.append("one set of colors for several pictures")
    if settings.fusion != "mean":
        parts.append(f"heads fused by {settings.fusion}")
    if settings.gradients != "plain":
        parts.append(f"{settings.gradients} gradients")
    if settings.points is not None:
        parts.append(f"mean of {settings.points} points")
    if settings.discard_ratio:
        parts.append(f"lowest {settings.discard_ratio:.0%} discarded")
    if settings.against is not None:
        parts.append(f"against {subject.classes[settings.against]}")
    if settings.method == "occlusion" and explanation.kind != "methods":
        parts.append(f"squares of {settings.window} x {settings.window} patches")
    if subject.label and not table:
        parts.append(f"label: {subject.label}")
    return ", ".join(parts)
