"""An explanation -> a picture, an animation, a page or a file of numbers.

In an animation only the map and the text change; the layout is fixed.
"""

import base64
import csv
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from vitrail.config.drawing import Look
from vitrail.config.settings import require
from vitrail.explain.animation import encode_animation, fade
from vitrail.explain.explanation import WRONG, Explanation, Frame
from vitrail.explain.map_settings import REMOVAL, TITLES
from vitrail.explain.page import make_page, page_data
from vitrail.explain.panels import Panel, compose, make_legends, scales
from vitrail.explain.removal import count_passes
from vitrail.runtime.files import replace_file

SUFFIXES = (".gif", ".webp", ".png", ".svg", ".pdf", ".html", ".npz", ".csv")
PICTURES = (".png", ".svg", ".pdf")
ANIMATED = ("rollout", "layers", "training")
"""Kinds that a notebook shows as an animation; the others are grids or a single map."""
MOST_ROWS = 50
"""Maximum number of pictures on one sheet."""


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
        replace_file(path, encode_animation(*draw_animation(explanation, look), suffix, look))
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
        "for one file per picture",
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

    ``.npz`` has ``maps_FGJ`` and ``titles_F``; ``.csv`` one line per frame, row, column and, for
    colors, channel. For Shapley values, both also have the standard errors.
    """
    maps_FGJ, titles = explanation.maps_FGJ, explanation.titles
    errors_FGJ = explanation.errors_FGJ
    if suffix == ".npz":
        arrays: dict[str, Any] = {"maps_FGJ": maps_FGJ, "titles_F": np.array(titles)}
        if errors_FGJ is not None:
            arrays["errors_FGJ"] = errors_FGJ
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    place = ["row", "column", "channel"][: maps_FGJ.ndim - 1]
    measured = ["value"] if errors_FGJ is None else ["value", "standard_error"]
    table.writerow(["frame", "title", *place, *measured])
    for (f, *at), value in np.ndenumerate(maps_FGJ):
        error = [] if errors_FGJ is None else [errors_FGJ[(f, *at)]]
        table.writerow([f, titles[f], *at, value, *error])
    return text.getvalue().encode()


def to_html(explanation: Explanation) -> str:
    """Return an image tag for a notebook, animated if the frames are a sequence."""
    if explanation.kind in ANIMATED and len(explanation.frames) > 1:
        frames, durations = draw_animation(explanation, Look())
        kind, content = "gif", encode_animation(frames, durations, ".gif", Look())
    else:
        kind, content = "png", to_picture(explanation, Look())
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(repr(explanation))}" src="data:image/{kind};base64,{data}">'


# Frames and sheets.


def draw_animation(explanation: Explanation, look: Look) -> tuple[list[Image.Image], list[int]]:
    """Return the frames (the bare picture, then the maps) and the duration of each in ms.

    The maps of a sequence fade into each other. Style reference has only the maps, as in the
    reference implementation.
    """
    maps = draw_frames(explanation, look)
    if look.style == "reference":
        return maps, [look.duration] * len(maps)
    bare, box = _draw_frame(explanation, look, 0, bare=True)
    sequence = explanation.kind in ANIMATED or len(maps) == 1
    return fade([bare, *maps], box, look.duration, cuts=not sequence)


def draw_frames(explanation: Explanation, look: Look) -> list[Image.Image]:
    """Draw each frame: the picture, and beside it the picture with the map over it."""
    _check_style(explanation, look)
    numbers = range(len(explanation.frames))
    return [_draw_frame(explanation, look, number)[0] for number in numbers]


def _draw_frame(
    explanation: Explanation, look: Look, number: int, *, bare: bool = False
) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Draw the picture, and beside it the picture with a map, or ``bare``.

    Also return left, top, right, bottom of the second one in pixels.
    """
    subject, frame = explanation.subject, explanation.frames[number]
    norm = _scales_of(explanation, look)[number]
    still = Panel(subject, _first_title(explanation, look), query=frame.query)
    moving = Panel(subject, frame.title, frame.map_GJ, norm, frame.query)
    if bare:
        moving = Panel(subject, " ", norm=norm, query=frame.query)
    legends = make_legends([frame], [norm], look, shares=_are_shares(explanation))
    notes = caption(explanation)
    figure = compose([[still, moving]], look, legends=legends, notes=notes, last=frame)
    pixels, size = io.BytesIO(), figure.canvas.get_width_height()
    figure.savefig(pixels, format="rgba")
    extents = figure.axes[1].get_window_extent().extents
    left, bottom, right, top = (round(float(end)) for end in extents)
    image = Image.frombytes("RGBA", size, pixels.getvalue()).convert("RGB")
    return image, (left, size[1] - top, right, size[1] - bottom)


def _scales_of(explanation: Explanation, look: Look) -> list[Normalize]:
    frames, shares = explanation.frames, _are_shares(explanation)
    return scales([f.map_GJ for f in frames], look, [f.signed for f in frames], shares=shares)


def _are_shares(explanation: Explanation) -> bool:
    """Return whether the values of each map add up to one: attention and rollout do."""
    return explanation.kind != "methods" and explanation.settings.method in ("attention", "rollout")


def draw_sheet(explanation: Explanation, look: Look) -> Figure:
    """Draw all frames on one sheet, the picture first."""
    _check_style(explanation, look)
    frames, norms = explanation.frames, _scales_of(explanation, look)
    subject = explanation.subject
    panels = [
        Panel(subject, _short_title(explanation, number), frame.map_GJ, norm, frame.query)
        for number, (frame, norm) in enumerate(zip(frames, norms, strict=True))
    ]
    first = Panel(subject, _first_title(explanation, look), query=frames[0].query)
    columns = explanation.columns or _count_columns(len(frames) + 1)
    if explanation.columns:
        rows = [[first], *_in_rows(panels, columns)]
    else:
        rows = _in_rows([first, *panels], columns)
    return compose(
        rows,
        look,
        legends=make_legends(frames, norms, look, shares=_are_shares(explanation)),
        notes=caption(explanation),
        last=frames[-1],
        row_titles=("", *explanation.row_titles) if explanation.row_titles else (),
    )


def _count_columns(panels: int) -> int:
    """Return the number of columns, 3 to 5, with the fewest gaps; up to 5 panels, one row."""
    return panels if panels <= 5 else min((5, 4, 3), key=lambda columns: -panels % columns)


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
        subject, scaled = explanation.subject, _scales_of(explanation, look)
        last = explanation.frames[-1]
        panels = [
            Panel(subject, _short_title(explanation, number), frame.map_GJ, norm, frame.query)
            for number, (frame, norm) in enumerate(zip(explanation.frames, scaled, strict=True))
        ]
        rows.append([Panel(subject, last.prediction, correct=last.correct), *panels])
        frames += explanation.frames
        norms += scaled
    return compose(
        rows,
        look,
        legends=make_legends(frames, norms, look),
        notes=f"{len(rows)} picture{'s' if len(rows) > 1 else ''}: "
        + caption(explanations[0], table=True),
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
        return "Picture"
    return f"Original ({label})" if label else "Original"


def _short_title(explanation: Explanation, number: int) -> str:
    """Return a panel's title on a sheet, without what its row and position show."""
    frame = explanation.frames[number]
    if explanation.kind == "heads":
        below = explanation.columns is not None and number >= explanation.columns
        return "" if below else frame.title.partition(", ")[2]
    if explanation.kind == "training":
        return f"{frame.title}: {frame.prediction}" if frame.prediction else frame.title
    if explanation.settings.method in ("similarity", "norms") and explanation.kind == "layers":
        return f"{frame.title}: {frame.map_GJ.min():.3g} to {frame.map_GJ.max():.3g}"
    if explanation.kind == "methods" and frame.failures:
        return f"{WRONG} {frame.title}"
    return "" if explanation.kind == "queries" else frame.title


def _in_rows(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    return [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]


def caption(explanation: Explanation, *, table: bool = False) -> str:
    """Return what is shown: the picture (not for a table of several), the method, its settings."""
    settings, subject = explanation.settings, explanation.subject
    method = explanation.about
    if method in TITLES:
        title = TITLES[explanation.settings.method]
        method = title if title == "Grad-CAM" else title[0].lower() + title[1:]
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
    if settings.method in REMOVAL and explanation.kind != "methods":
        parts.append(f"squares of {settings.window} x {settings.window} patches")
    if settings.method == "shapley" and explanation.kind != "methods":
        assert explanation.errors_FGJ is not None
        parts.append(f"{count_passes(subject.model.config.grid_GJ, settings)} passes")
        largest = float(explanation.errors_FGJ.max())
        unknown = math.isnan(largest)
        parts.append("standard error unknown" if unknown else f"standard error <= {largest:.2g}")
    if subject.label and not table:
        parts.append(f"label: {subject.label}")
    failures = list(dict.fromkeys(w for frame in explanation.frames for w in frame.failures))
    if failures and explanation.kind == "methods":
        parts.append(f"{WRONG}: fails a test on this model ({' or '.join(failures)})")
    elif failures:
        parts.append(f"fails a test on this model: {', '.join(failures)}")
    return ", ".join(parts)
