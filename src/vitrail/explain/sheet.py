"""An explanation -> a file: one picture, an animation, or the interactive page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from vitrail.config.settings import require
from vitrail.explain.draw import (
    BLACK,
    GREEN,
    RED,
    SCALES,
    Colormap,
    Normalization,
    Panel,
    colormap_bytes,
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
from vitrail.explain.gif import encode_png, save_animation
from vitrail.explain.methods import METHODS, MapSettings, early_logits
from vitrail.explain.page import PageData, write_page
from vitrail.runtime.files import replace_file

ONE_ROW = 5
"""Fewer panels than this fill one row; more are broken into rows of four."""
SUFFIXES = (".gif", ".webp", ".png", ".html")


@dataclass(frozen=True)
class Look:
    """How maps are drawn and animated."""

    style: Literal["vitrail", "reference"] = "vitrail"
    """seed draws frames as the reference system does: the picture dimmed by its rollout."""
    normalize: Normalization = "frame"
    """Scale of the maps: each its own (frame), one for all (picture), or unscaled values (none)."""
    colormap: Colormap = "magma"
    """Colors of the values; all color maps are perceptually uniform."""
    alpha: float = 0.6
    """Opacity of the map over the picture, 0 to 1."""
    duration: int = 500
    """Milliseconds per frame of an animation."""
    loop: int = 0
    """How often an animation repeats; 0 means forever."""

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, f"alpha is {self.alpha}: give a number from 0 to 1")
        known = get_args(Normalization)
        require(
            self.normalize in known,
            f"normalize is {self.normalize!r}: give {', '.join(known)}",
        )
        require(
            self.style in ("vitrail", "reference"),
            f"style is {self.style!r}: give vitrail, reference",
        )
        colormap_bytes(self.colormap)


def save(explanation: Explanation, path: Path, look: Look) -> Path:
    """Write the format of the file's extension: .gif or .webp moves, .png is one picture.

    A .html file is the interactive page.

    Raises:
        ConfigError: another extension, or a look that does not fit the explanation.
        OutputError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    require(suffix in SUFFIXES, f"{path}: give a file that ends in {', '.join(SUFFIXES)}")
    if suffix == ".html":
        require(look.style == "vitrail", "style reference is a picture or an animation, not a page")
        write_page(path, page_data(explanation))
    elif look.style == "reference":
        save_animation(draw_seed(explanation), path, durations_ms=look.duration, loop=look.loop)
    elif suffix == ".png":
        replace_file(path, encode_png(draw_sheet(explanation, look)))
    else:
        frames = draw_frames(explanation, look)
        save_animation(frames, path, durations_ms=look.duration, loop=look.loop)
    return path


def draw_frames(explanation: Explanation, look: Look) -> list[Image.Image]:
    """Draw each frame as the picture and beside it the map over it."""
    maps_FGJ = normalize(explanation.maps_FGJ, look.normalize)
    low_F, high_F = limits(explanation.maps_FGJ, look.normalize)
    return [
        compose(
            [[Panel(original(explanation, frame, columns=2), "picture"),
              Panel(painted(explanation, map_GJ, look, columns=2), frame.title)]],
            caption=caption(explanation, frame.says),
            ink=ink(frame),
            colorbar=(look.colormap, float(low), float(high), SCALES[look.normalize]),
        )
        for frame, map_GJ, low, high in zip(
            explanation.frames, maps_FGJ, low_F, high_F, strict=True
        )
    ]  # fmt: skip


def draw_sheet(explanation: Explanation, look: Look) -> Image.Image:
    """Draw all frames on one sheet, the picture first."""
    frames, maps_FGJ = explanation.frames, normalize(explanation.maps_FGJ, look.normalize)
    columns = explanation.columns or (len(frames) + 1 if len(frames) < ONE_ROW else 4)
    panels = [
        Panel(painted(explanation, map_GJ, look, columns=columns, query=frame.query),
              short_title(explanation, frame))
        for frame, map_GJ in zip(frames, maps_FGJ, strict=True)
    ]  # fmt: skip
    first = Panel(original(explanation, frames[0], columns=columns), "picture")
    titles: Sequence[str] = ()
    if explanation.columns:
        rows = [[first], *in_rows(panels, columns)]
        titles = ("", *explanation.row_titles) if explanation.row_titles else ()
    else:
        rows = in_rows([first, *panels], columns)
    low_F, high_F = limits(explanation.maps_FGJ, look.normalize)
    ends = (0.0, 1.0) if look.normalize == "frame" else (float(low_F[0]), float(high_F[0]))
    return compose(
        rows,
        caption=caption(explanation, frames[-1].says),
        ink=ink(frames[-1]),
        colorbar=(look.colormap, *ends, SCALES[look.normalize]),
        row_titles=titles,
    )


def short_title(explanation: Explanation, frame: Frame) -> str:
    """Return a panel's title on a sheet, where its row and place say a part of it."""
    if explanation.kind == "heads":
        return frame.title.partition(", ")[2]
    if explanation.kind == "training":
        return f"{frame.title}: {frame.says}"
    return "" if explanation.kind == "queries" else frame.title


def in_rows(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    """Break panels into rows."""
    return [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]


def original(explanation: Explanation, frame: Frame, *, columns: int) -> np.ndarray:
    """Return the picture as it is shown, the query marked where there is one."""
    shown_HWC = show(explanation.subject.picture_HWC, columns=columns)
    return mark(explanation, shown_HWC, frame.query)


def painted(
    explanation: Explanation,
    map_GJ: np.ndarray,
    look: Look,
    *,
    columns: int,
    query: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return a map of 0..1 over the picture as it is shown."""
    subject = explanation.subject
    shown_HWC = show(subject.picture_HWC, columns=columns)
    map_HW = place(
        map_GJ, picture_hw(subject.picture_HWC), subject.model.config.image_hw, subject.fit,
        shown_hw=picture_hw(shown_HWC),
    )  # fmt: skip
    painted_HWC = overlay(shown_HWC, map_HW, colormap=look.colormap, alpha=look.alpha)
    return mark(explanation, painted_HWC, query)


def mark(
    explanation: Explanation, shown_HWC: np.ndarray, query: tuple[int, int] | None
) -> np.ndarray:
    """Frame the query's patch, if there is a query."""
    if query is None:
        return shown_HWC
    subject, config = explanation.subject, explanation.subject.model.config
    box = shown_box(
        picture_hw(subject.picture_HWC), config.image_hw, subject.fit, picture_hw(shown_HWC)
    )
    return mark_patch(shown_HWC, query, config.grid_GJ, box)


def picture_hw(picture_HWC: np.ndarray) -> tuple[int, int]:
    """Return height and width."""
    return picture_HWC.shape[0], picture_HWC.shape[1]


def caption(explanation: Explanation, says: str) -> str:
    """Return what the model says, and below it what is shown."""
    settings, subject = explanation.settings, explanation.subject
    method = "all methods" if explanation.kind == "methods" else settings.method
    parts = [f"{subject.name}: {method.replace('_', ' ')}"]
    if settings.fusion != "mean":
        parts.append(f"heads fused by {settings.fusion}")
    if settings.discard_ratio:
        parts.append(f"lowest {settings.discard_ratio:.0%} discarded")
    if subject.label:
        parts.append(f"label: {subject.label}")
    return f"{says}\n{', '.join(parts)}"


def ink(frame: Frame) -> str:
    """Return the color of what the model says: red where the label is another class."""
    return {True: GREEN, False: RED, None: BLACK}[frame.right]


def draw_seed(explanation: Explanation) -> list[Image.Image]:
    """Draw the reference system's frames."""
    settings, subject = explanation.settings, explanation.subject
    require(
        explanation.kind == "rollout" and settings.method == "rollout",
        "style reference draws the rollout, layer by layer: leave out method and frames",
    )
    layers = [int(frame.title.rpartition(" ")[2]) for frame in explanation.frames]
    return reference_frames(
        subject.raw_HWC,
        explanation.maps_FGJ,
        title=subject.label,
        prediction=explanation.frames[-1].says,
        ink=ink(explanation.frames[-1]),
        layers=layers,
    )


def page_data(explanation: Explanation) -> PageData:
    """Work out all that the interactive page shows, whatever the explanation's own method."""
    subject, index = explanation.subject, explanation.class_index
    model, config = subject.model, subject.model.config
    maps = {
        method: maps_of(subject, model, MapSettings(method=method), index) for method in METHODS
    }
    logits_Y = maps["attention"].logits_BY[0]
    return PageData(
        picture_png=encode_png(Image.fromarray(show(subject.picture_HWC))),
        box=shown_box(
            picture_hw(subject.picture_HWC), config.image_hw, subject.fit,
            picture_hw(show(subject.picture_HWC)),
        ),
        grid_GJ=config.grid_GJ,
        class_token=config.has_class_token,
        mean_pool=config.pool == "mean",
        classes=subject.classes,
        logits_Y=logits_Y.numpy(),
        early_logits_LY=early_logits(model, subject.image_1CHW)[0].numpy(),
        attention_LATT=attention_of(explanation),
        maps={name: each.values_BLGJ[0].numpy() for name, each in maps.items()},
        title=subject.name,
        label=subject.label,
        explained=None if index == int(logits_Y.argmax()) else index,
    )  # fmt: skip


def attention_of(explanation: Explanation) -> np.ndarray:
    """Return the attention of every layer and head, (L, A, T, T)."""
    subject = explanation.subject
    with torch.inference_mode():
        _, attentions = subject.model.forward_with_attention(subject.image_1CHW)
    stacked: np.ndarray = torch.cat(attentions).cpu().numpy()
    return stacked
