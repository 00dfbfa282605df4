"""An explanation -> a file: one picture, an animation, or the interactive page."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitrail.config.settings import Look, require
from vitrail.explain.draw import (
    BLACK,
    GREEN,
    RED,
    SCALES,
    Panel,
    compose,
    limits,
    mark_patch,
    normalize,
    overlay,
    place,
    reference_frames,
    show,
    shown_box,
)
from vitrail.explain.explanation import Explanation, Frame, maps_of
from vitrail.explain.gif import encode_gif, encode_png, same_size, save_animation
from vitrail.explain.methods import METHODS, MapSettings, early_logits
from vitrail.explain.page import PageData, write_page
from vitrail.runtime.files import replace_file

SUFFIXES = (".gif", ".webp", ".png", ".html")
ANIMATED = ("rollout", "layers", "training")
"""Kinds that a notebook shows animated; the others are grids or a single map."""


def save(explanation: Explanation, path: Path, look: Look) -> Path:
    """Write the format of the file's extension: an animation (.gif, .webp), a picture or a page.

    Raises:
        ConfigError: another extension, or a look that the explanation does not support.
        OutputError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    require(suffix in SUFFIXES, f"{path}: give a file that ends in {', '.join(SUFFIXES)}")
    if suffix == ".html":
        require(look.style == "vitrail", "style reference is a picture or an animation, not a page")
        write_page(path, page_data(explanation))
    elif look.style == "reference":
        save_animation(
            _draw_reference(explanation), path, durations_ms=look.duration, loop=look.loop
        )
    elif suffix == ".png":
        replace_file(path, encode_png(_draw_sheet(explanation, look)))
    else:
        frames = _draw_frames(explanation, look)
        save_animation(frames, path, durations_ms=look.duration, loop=look.loop)
    return path


def _draw_frames(explanation: Explanation, look: Look) -> list[Image.Image]:
    """Draw each frame: the picture, and beside it the picture with the map over it."""
    maps_FGJ = normalize(explanation.maps_FGJ, look.normalize)
    low_F, high_F = limits(explanation.maps_FGJ, look.normalize)
    return [
        compose(
            [[Panel(_drawn(explanation, look, columns=2, query=frame.query), "picture"),
              Panel(_drawn(explanation, look, columns=2, map_GJ=map_GJ), frame.title)]],
            caption=caption(explanation, frame.prediction),
            ink=_ink(frame),
            colorbar=(look.colormap, float(low), float(high), SCALES[look.normalize]),
        )
        for frame, map_GJ, low, high in zip(
            explanation.frames, maps_FGJ, low_F, high_F, strict=True
        )
    ]  # fmt: skip


def _draw_sheet(explanation: Explanation, look: Look) -> Image.Image:
    """Draw all frames on one sheet, the picture first."""
    frames, maps_FGJ = explanation.frames, normalize(explanation.maps_FGJ, look.normalize)
    columns = explanation.columns or (len(frames) + 1 if len(frames) < 5 else 4)
    panels = [
        Panel(_drawn(explanation, look, columns=columns, map_GJ=map_GJ, query=frame.query),
              _short_title(explanation, frame))
        for frame, map_GJ in zip(frames, maps_FGJ, strict=True)
    ]  # fmt: skip
    picture_HWC = _drawn(explanation, look, columns=columns, query=frames[0].query)
    first = Panel(picture_HWC, "picture")
    titles: Sequence[str] = ()
    if explanation.columns:
        rows = [[first], *_in_rows(panels, columns)]
        titles = ("", *explanation.row_titles) if explanation.row_titles else ()
    else:
        rows = _in_rows([first, *panels], columns)
    low_F, high_F = limits(explanation.maps_FGJ, look.normalize)
    ends = (0.0, 1.0) if look.normalize == "frame" else (float(low_F[0]), float(high_F[0]))
    return compose(
        rows,
        caption=caption(explanation, frames[-1].prediction),
        ink=_ink(frames[-1]),
        colorbar=(look.colormap, *ends, SCALES[look.normalize]),
        row_titles=titles,
    )


def _short_title(explanation: Explanation, frame: Frame) -> str:
    """Return a panel's title on a sheet, without what its row and position show."""
    if explanation.kind == "heads":
        return frame.title.partition(", ")[2]
    if explanation.kind == "training":
        return f"{frame.title}: {frame.prediction}"
    return "" if explanation.kind == "queries" else frame.title


def _in_rows(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    return [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]


def _drawn(
    explanation: Explanation,
    look: Look,
    *,
    columns: int,
    map_GJ: np.ndarray | None = None,
    query: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return the picture as drawn; over it a map of 0..1 and the outline of the query, if given."""
    subject, config = explanation.subject, explanation.subject.model.config
    shown_HWC = show(subject.picture_HWC, columns=columns)
    shown_hw = _size(shown_HWC)
    fitting = _size(subject.picture_HWC), config.image_hw, subject.fit
    if map_GJ is not None:
        map_HW = place(map_GJ, *fitting, shown_hw=shown_hw)
        shown_HWC = overlay(shown_HWC, map_HW, colormap=look.colormap, alpha=look.alpha)
    if query is not None:
        shown_HWC = mark_patch(shown_HWC, query, config.grid_GJ, shown_box(*fitting, shown_hw))
    return shown_HWC


def _size(picture_HWC: np.ndarray) -> tuple[int, int]:
    """Return height and width."""
    return picture_HWC.shape[0], picture_HWC.shape[1]


def caption(explanation: Explanation, prediction: str) -> str:
    """Return the prediction, and below it what is shown."""
    settings, subject = explanation.settings, explanation.subject
    method = "all methods" if explanation.kind == "methods" else settings.method
    parts = [f"{subject.name}: {method.replace('_', ' ')}"]
    if settings.fusion != "mean":
        parts.append(f"heads fused by {settings.fusion}")
    if settings.discard_ratio:
        parts.append(f"lowest {settings.discard_ratio:.0%} discarded")
    if subject.label:
        parts.append(f"label: {subject.label}")
    return f"{prediction}\n{', '.join(parts)}"


def _ink(frame: Frame) -> str:
    """Return the color of the prediction: red if the label is another class."""
    return {True: GREEN, False: RED, None: BLACK}[frame.correct]


def _draw_reference(explanation: Explanation) -> list[Image.Image]:
    """Draw the reference implementation's frames."""
    settings, subject = explanation.settings, explanation.subject
    require(
        explanation.kind == "rollout" and settings.method == "rollout",
        "style reference draws the rollout, layer by layer: leave out method and frames",
    )
    last = explanation.frames[-1]
    return reference_frames(
        subject.raw_HWC,
        explanation.maps_FGJ,
        title=subject.label,
        prediction=last.prediction,
        ink=_ink(last),
        layers=[int(frame.title.rpartition(" ")[2]) for frame in explanation.frames],
    )


def page_data(explanation: Explanation) -> PageData:
    """Compute everything that the interactive page shows, whatever the explanation's method."""
    subject, index = explanation.subject, explanation.class_index
    model, config = subject.model, subject.model.config
    maps = {
        method: maps_of(subject, model, MapSettings(method=method), index) for method in METHODS
    }
    logits_Y = maps["attention"].logits_BY[0]
    with torch.inference_mode():
        _, attentions = model.forward_with_attention(subject.image_1CHW)
    return PageData(
        picture_png=encode_png(Image.fromarray(show(subject.picture_HWC))),
        box=shown_box(
            _size(subject.picture_HWC), config.image_hw, subject.fit,
            _size(show(subject.picture_HWC)),
        ),
        grid_GJ=config.grid_GJ,
        class_token=config.has_class_token,
        mean_pool=config.pool == "mean",
        classes=subject.classes,
        logits_Y=logits_Y.numpy(),
        early_logits_LY=early_logits(model, subject.image_1CHW)[0].numpy(),
        attention_LATT=torch.cat(attentions).cpu().numpy(),
        maps={name: each.values_BLGJ[0].numpy() for name, each in maps.items()},
        title=subject.name,
        label=subject.label,
        explained=None if index == int(logits_Y.argmax()) else index,
    )  # fmt: skip


def to_png(explanation: Explanation) -> bytes:
    """Return all frames on one sheet, as a PNG file, for a notebook."""
    return encode_png(_draw_sheet(explanation, Look()))


def to_html(explanation: Explanation) -> str:
    """Return an image tag for a notebook, animated if the frames are a sequence."""
    look = Look()
    if explanation.kind in ANIMATED and len(explanation.frames) > 1:
        frames = same_size(_draw_frames(explanation, look))
        kind, content = "gif", encode_gif(frames, [look.duration] * len(frames), look.loop)
    else:
        kind, content = "png", to_png(explanation)
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(repr(explanation))}" src="data:image/{kind};base64,{data}">'
