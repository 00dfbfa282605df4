"""Names of the files that ``vitrail explain`` writes."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import ConfigError
from vitrail.explain.map_settings import default_view

if TYPE_CHECKING:
    from vitrail.cli.explain import ExplainOptions

PAGES = (".html", ".htm")
UNSUPPORTED = (".jpg", ".jpeg", ".mp4", ".mov", ".webm", ".json")
"""Extensions that also mark a file, although explanations cannot be written in these formats."""
NUMBERS = (".npz", ".csv")
VECTORS = (".svg", ".pdf")
SETTINGS = (
    "against", "query", "layers", "heads", "fusion", "discard_ratio", "gradients", "points",
    "resolution", "window", "passes",
)  # fmt: skip
"""Flags that choose a map, besides the method and the class."""


def given(options: object, names: Iterable[str]) -> list[str]:
    """Return the names of those fields that differ from the default."""
    default = type(options)()
    return [name for name in names if getattr(options, name) != getattr(default, name)]


def is_file_name(path: Path) -> bool:
    """Return whether an output path names a file: it has the extension of a picture or page.

    ``results/v1.2`` is a folder; ``cat.bmp`` is a file, though its format cannot be written.
    """
    from vitrail.data.formats import SUFFIXES

    known = path.suffix.lower() in (*SUFFIXES, *PAGES, *NUMBERS, *VECTORS, *UNSUPPORTED)
    return known and not os.path.isdir(path)  # noqa: PTH112 (False for a name that is too long)


def name_files(options: "ExplainOptions", names: Sequence[str]) -> list[Path]:
    """Return a file for each picture; repeated names are numbered."""
    asked = options.output_path
    if asked is not None and is_file_name(asked):
        ending = asked.suffix.lower().removeprefix(".")
        if options.format not in (None, ending):
            raise ConfigError(
                f"--format {options.format} contradicts {asked}: leave one of them out"
            )
        if len(names) > 1:
            raise ConfigError(
                f"{len(names)} pictures do not fit into one file, {asked}: give a folder"
            )
        return [asked]
    ending = options.format or "gif"
    rest = "".join(f"-{part}" for part in _describe_settings(options, page=ending == "html"))
    paths: list[Path] = []
    for name in names:
        base = Path(name).stem + rest
        path, number = options.folder / f"{base}.{ending}", 2
        while path in paths:
            path, number = options.folder / f"{base}-{number}.{ending}", number + 1
        paths.append(path)
    return paths


def name_table(options: "ExplainOptions") -> Path | None:
    """Return the file for one sheet of several pictures, or None if the format is not a picture."""
    asked, ending = options.output_path, options.format or "png"
    if asked is not None and is_file_name(asked):
        ending = asked.suffix.lower().removeprefix(".")  # type: ignore[assignment]
    if ending not in ("png", "svg", "pdf"):
        return None
    return name_files(replace(options, format=options.format or ending), ["sheet"])[0]


def view_of(
    options: "ExplainOptions", *, has_classes: bool = True
) -> tuple[str | None, str | None]:
    """Return method and frames: as given, or as the other flags require."""
    if options.method is not None or options.frames is not None:
        return options.method, options.frames
    if options.drawing.style == "reference" or given(options.drawing, ["colormap"]):
        return "rollout", None
    return default_view(given(options, SETTINGS), has_classes=has_classes)


def _describe_settings(options: "ExplainOptions", *, page: bool) -> list[str]:
    """Return what distinguishes this drawing of a picture from others, as parts of a file name.

    The method (a page has all of them), then every setting that is not the default, so that
    drawings with different settings never overwrite each other. (Those of different models do.)
    """
    parts = [] if page else [part for part in view_of(options) if part]
    for name in given(options, ("class_name", *SETTINGS)):
        short = name.removesuffix("_name").removesuffix("_ratio")
        parts.append(f"{short}-{getattr(options, name)}")
    if options.image_size is not None:
        parts.append(f"image_size-{options.image_size}")
    if options.data.dataset is not None:
        parts.append(options.data.dataset)
    parts += [f"{name}-{value}" for name, value in options.preparation.items()]
    drawing = options.drawing
    parts += [f"{name}-{getattr(drawing, name)}" for name in given(drawing, vars(drawing))]
    return [re.sub(r"[^\w.]+", "-", part)[:60].strip("-") for part in parts]
