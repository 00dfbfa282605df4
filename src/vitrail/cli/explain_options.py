"""The flags of ``vitrail explain``, and how they are read."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vitrail.cli.options import ModelOptions
from vitrail.errors import ConfigError, nearest

PROG = "vitrail explain"
ALL = "all"
PAGES = (".html", ".htm")
UNSERVED = (".jpg", ".jpeg", ".svg", ".pdf", ".mp4", ".mov", ".webm", ".json", ".csv")
"""Endings that people give to files, and that no explanation is written as."""
FEWEST = 10
"""Images that a confidence interval needs; the same as ``explain.intervals.FEWEST``."""
CLASSLESS = {"attention", "rollout"}
"""Methods that show the same whatever class is asked for."""


@dataclass(frozen=True)
class DrawingOptions:
    """How the maps are drawn."""

    style: Literal["vitrail", "reference"] = "vitrail"
    """reference: as the reference implementation draws: the picture dimmed by its rollout."""
    normalise: Literal["frame", "picture", "none"] = "frame"
    """Scale of the maps: each its own (frame), one for all (picture), or unscaled values (none)."""
    colormap: str = "magma"
    """magma, inferno, plasma, viridis or cividis."""
    alpha: float = 0.6
    """Opacity of the map over the picture, 0 to 1."""
    duration: int = 500
    """Milliseconds per frame of an animation."""
    loop: int = 0
    """How often an animation repeats; 0 means forever."""


@dataclass(frozen=True)
class ScoreOptions:
    """Measure how far the maps can be trusted."""

    score: bool = False
    """Score the methods on a data set instead of drawing: a table and a plot."""
    split: Literal["validation", "test", "train"] = "validation"
    """The split for --score and --index."""
    images: int = 200
    """Number of images to score."""
    dataset: Literal["shapes", "cifar10", "cifar100", "folder"] | None = None
    """Data set. Default: the one that the model was trained on."""
    data_path: Path | None = None
    """Folder of the data. Default: where they were for the training."""

    @property
    def data(self) -> dict[str, Any]:
        """What of the data differs from the training's, as ``run.load_split`` takes it."""
        named = {"dataset": self.dataset, "data_path": self.data_path}
        # All test images, even if the training run used only some of them.
        changes: dict[str, Any] = {"num_test_images": None}
        return changes | {name: value for name, value in named.items() if value is not None}


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class ExplainOptions(ModelOptions):
    """Show what a model looked at in a picture.

    For example: vitrail explain cat.png --method relevance --class dog --output_path cat.gif
    """

    pictures: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files, folders, globs, or - for a picture on standard input."""
    index: int | None = None
    """Explain this image of the model's data (see --split) instead of a file."""
    method: str | None = None
    """attention, rollout, gradient_rollout, relevance, gradcam, occlusion; several: a,b; or all."""
    frames: str | None = None
    """What varies between frames: rollout, layers, heads, queries or training."""
    format: Literal["gif", "webp", "png", "html"] | None = None
    """Output format. Default: from the extension of --output_path, else gif."""
    output_path: Path | None = None
    """File, or folder for several pictures. Default: output/explain."""
    layers: str | None = None
    """Layers, counted from 1; for example, 2,4-6. Default: all."""
    heads: str | None = None
    """Heads, counted from 1; for example, 1,3. Default: all."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """The class to explain. Default: the predicted one."""
    query: str | None = None
    """ROW,COLUMN, from 0, of a patch: show what it attends to. Default: what the head reads."""
    fusion: Literal["mean", "max", "min"] = "mean"
    """How the heads are combined."""
    discard_ratio: float = 0.0
    """Fraction of each layer's lowest attention entries that a rollout drops."""
    drawing: DrawingOptions = field(default_factory=DrawingOptions)
    scoring: ScoreOptions = field(default_factory=ScoreOptions)

    @property
    def folder(self) -> Path:
        """The folder of the output files."""
        asked = self.output_path
        if asked is None:
            return Path("output") / "explain"
        return asked.parent if is_file_name(asked) else asked


def is_file_name(path: Path) -> bool:
    """Return whether an output path names a file: it ends as pictures and pages do.

    ``results/v1.2`` is a folder; ``cat.bmp`` is a file, though of a kind that cannot be written.
    """
    from vitrail.data.pictures import SUFFIXES

    known = path.suffix.lower() in (*SUFFIXES, *PAGES, *UNSERVED)
    return known and not os.path.isdir(path)  # noqa: PTH112 (False for a name that is too long)


def check(options: ExplainOptions) -> None:
    """Refuse flags that exclude each other."""
    given = bool(options.pictures) + (options.index is not None) + options.scoring.score
    if given == 0:
        raise ConfigError(f"no picture given: {PROG} PICTURE, or --index N, or --score")
    if given > 1:
        raise ConfigError("a picture, --index and --score cannot be combined: give one of them")
    if options.scoring.score:
        check_images(options.scoring.images)
        if options.output_path is not None and is_file_name(options.output_path):
            raise ConfigError(
                f"--score writes scores.json and scores.png: {options.output_path} is a file, "
                "give a folder"
            )


def check_images(count: int) -> None:
    """Refuse fewer images than statistics over images need."""
    if count < FEWEST:
        raise ConfigError(f"--images is {count}: give at least {FEWEST}")


def check_drawing(options: ExplainOptions, *, page: bool) -> None:
    """Refuse flags that would have no effect on the drawing."""
    if page:
        default = ExplainOptions()
        chosen = ("method", "frames", "layers", "heads", "query", "fusion", "discard_ratio")
        idle = [name for name in chosen if getattr(options, name) != getattr(default, name)]
        drawing = vars(options.drawing)
        idle += [name for name in drawing if drawing[name] != vars(default.drawing)[name]]
        if idle:
            raise ConfigError(
                "a page contains every method, layer and head to choose from: "
                f"leave out {', '.join(f'--{name}' for name in idle)}"
            )
    elif options.class_name is not None and not set(list_methods(options.method)) - CLASSLESS:
        raise ConfigError(
            "attention and rollout are the same for every class: leave out --class, or use "
            "--method relevance, gradient_rollout, gradcam or occlusion"
        )


def list_methods(text: str | None) -> list[str]:
    """Return the methods that --method names; none without it."""
    from vitrail.explain.methods import METHODS

    if text is None:
        return []
    if text == ALL:
        return list(METHODS)
    names = [name.strip().replace("-", "_") for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            known = f"{', '.join(METHODS)}, or {ALL}"
            raise ConfigError(f"no method {name!r}{nearest(name, METHODS)}: one of {known}")
    return names


def read_numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    """Read 2,4-6 as 2, 4, 5, 6."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 9:
            raise ConfigError(f"--{name} is {text!r:.60}: give numbers such as 2, 1,3 or 2-4")
        stop = int(last) if dash else int(first)
        if not 0 <= stop - int(first) <= 1000:
            raise ConfigError(f"--{name} is {text!r:.60}: a range goes upwards, by at most 1000")
        numbers += range(int(first), stop + 1)
    return tuple(numbers)


def read_query(text: str | None) -> tuple[int, int] | None:
    """Read ROW,COLUMN."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) < 9 for part in parts):
        raise ConfigError(f"--query is {text!r:.60}: give ROW,COLUMN of a patch, from 0")
    return int(parts[0]), int(parts[1])


def name_files(options: ExplainOptions, names: Sequence[str]) -> list[Path]:
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
    rest = "".join(f"-{part}" for part in describe_settings(options, page=ending == "html"))
    paths: list[Path] = []
    for name in names:
        base = Path(name).stem + rest
        path, number = options.folder / f"{base}.{ending}", 2
        while path in paths:
            path, number = options.folder / f"{base}-{number}.{ending}", number + 1
        paths.append(path)
    return paths


def describe_settings(options: ExplainOptions, *, page: bool) -> list[str]:
    """Return what makes this drawing of a picture another one, as parts of a file's name.

    The method (a page has all of them), then every setting that is not the default: so drawings
    with different settings never overwrite each other.
    """
    first = [part for part in (options.method, options.frames) if part] or ["rollout"]
    parts = [] if page else first
    default = ExplainOptions()
    for name in ("class_name", "query", "layers", "heads", "fusion", "discard_ratio"):
        value = getattr(options, name)
        if value != getattr(default, name):
            parts.append(f"{name.removesuffix('_name').removesuffix('_ratio')}-{value}")
    parts += [f"{name}-{value}" for name, value in options.preparation.given().items()]
    for name, value in vars(options.drawing).items():
        if value != getattr(default.drawing, name):
            parts.append(f"{name}-{value}")
    return [re.sub(r"[^\w.]+", "-", part)[:60].strip("-") for part in parts]
