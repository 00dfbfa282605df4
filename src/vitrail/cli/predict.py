"""``vitrail predict``."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from vitrail.cli.console import out, print_err, print_out, progress_bar
from vitrail.cli.options import (
    STDIN,
    PictureOptions,
    is_onnx,
    list_pictures,
    load_model,
    take_model,
)
from vitrail.cli.parsing import parse
from vitrail.errors import ConfigError, PictureError, printable

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier
    from vitrail.inference.onnx_classifier import OnnxClassifier
    from vitrail.inference.predictions import Ranking

PROG = "vitrail predict"
NAME_WIDTH = 24
"""Minimum width of the column of names; longer names are wrapped."""
SHOWN_CLASSES = 20
SHOWN_UNLIKE = 10
CHUNK = 64
"""Number of pictures that are read, then classified together."""


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class PredictOptions(PictureOptions):
    """Classify pictures of any kind and size, with a model or with an exported ONNX file.

    ONNX Runtime runs .onnx files; torch is then neither loaded nor needed.

    For example:
      vitrail predict cat.jpg
      vitrail predict output/quick photos/ 'more/*.jpg' --csv
      curl -s URL | vitrail predict -
    """

    top_k: int = 3
    """Number of classes to report, the most probable first."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Background of transparent pictures: red, green, blue."""
    json: bool = False
    """Print JSON on standard output."""
    csv: bool = False
    """Print CSV on standard output."""


Answer = tuple[str, "Ranking"]


def command(args: Sequence[str]) -> int:
    """Run ``vitrail predict``."""
    options = take_model(parse(PredictOptions, args, prog=PROG))
    _check(options)
    names = list_pictures(options.pictures)
    classifier = _load_classifier(options)
    answers, broken = _predict_all(classifier, names, options)
    if broken and not answers:
        raise PictureError(
            broken[0] if len(broken) == 1 else f"{broken[0]} (and {len(broken) - 1} more)"
        )
    for message in broken:
        print_err(f"vitrail: {message}")
    if not (options.json or options.csv):
        print_out(describe_classes(classifier))
    print_answers(answers, options)
    return 1 if broken else 0


def _check(options: PredictOptions) -> None:
    """Refuse flags that exclude each other."""
    if options.json and options.csv:
        raise ConfigError("--json and --csv cannot be combined: give one of them")
    if not options.pictures:
        raise ConfigError(f"no picture given: {PROG} PICTURE, a folder, a glob, or -")
    if options.top_k < 1:
        raise ConfigError(f"top_k is {options.top_k}: give at least 1")
    if not all(0 <= value <= 255 for value in options.background):
        raise ConfigError(f"background is {options.background}: give three numbers from 0 to 255")


def _load_classifier(options: PredictOptions) -> "Classifier | OnnxClassifier":
    """Load the model; torch is imported only if it is not an ONNX file."""
    if not is_onnx(options.model_path):
        return load_model(options, files=True)
    from vitrail.inference.onnx_classifier import load_onnx

    if options.n_attention_heads is not None:
        raise ConfigError("--n_attention_heads does not apply to ONNX files: leave it out")
    assert options.model_path is not None
    exported = load_onnx(options.model_path, device=options.device)
    return exported.prepared(**options.preparation)


def _predict_all(
    classifier: "Classifier | OnnxClassifier", names: list[str], options: PredictOptions
) -> tuple[list[Answer], list[str]]:
    """Classify the pictures that can be read; return the answers, and the errors of the rest."""
    import numpy as np

    answers: list[Answer] = []
    broken: list[str] = []
    with progress_bar("classifying", len(names)) as advance:
        for start in range(0, len(names), CHUNK):
            read: list[str] = []
            raws: list[np.ndarray] = []
            for name in names[start : start + CHUNK]:
                source = sys.stdin.buffer.read() if name == STDIN else name
                try:
                    raws.append(classifier.read(source, background=options.background))
                    read.append(name)
                except PictureError as error:
                    broken.append(str(error))
                advance(1)
            if raws:
                predictions = classifier.predict_raw(np.concatenate(raws), options.top_k)
                answers += zip(read, predictions, strict=True)
    return answers, broken


def print_answers(answers: list[Answer], options: PredictOptions) -> None:
    """Print predictions as a table, JSON or CSV."""
    if options.json:
        rows = [
            {
                "picture": name,
                "predictions": [{"class": p.name, "probability": p.probability} for p in top],
                "familiarity": top.familiarity,
                "unlike": None if top.familiarity is None else top.unlike,
            }
            for name, top in answers
        ]
        print(json.dumps(rows))
    elif options.csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["picture", "rank", "class", "probability"])
        for name, top in answers:
            writer.writerows(
                [_cell(name), rank, _cell(p.name), p.probability] for rank, p in enumerate(top, 1)
            )
        print(text.getvalue(), end="")
    else:
        print_table(answers)
        _warn(answers)


def _warn(answers: list[Answer]) -> None:
    """Name the pictures that are unlike the training images."""
    from vitrail.evaluation.calibration import describe_unlike

    unlike = [(name, top.familiarity) for name, top in answers if top.unlike]
    for name, familiarity in unlike[:SHOWN_UNLIKE]:
        print_out(f"{printable(name)}: {describe_unlike(familiarity)}", style="yellow")
    if (more := len(unlike) - SHOWN_UNLIKE) > 0:
        print_out(f"and {more:,} more pictures (--json has all)", style="yellow")


def _cell(name: str) -> str:
    """Return a name as a CSV cell, without control characters and without formulas.

    --json has the unchanged names.
    """
    formula = len(name) > 1 and name[0] in "=+-@"
    return f"'{printable(name)}" if formula else printable(name)


def print_table(answers: list[Answer]) -> None:
    """Print a row per picture, or a row per class if the columns would be cut off."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    cells = [[f"{printable(p.name)} {p.probability:.1%}" for p in top] for _, top in answers]
    columns = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    names = max((cell_len(printable(name)) for name, _ in answers), default=0)
    wide = min(names, NAME_WIDTH) + sum(width + 3 for width in columns) <= out.width
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("picture", overflow="fold")
    if wide:
        for rank in range(1, len(columns) + 1):
            table.add_column(f"{rank}.", no_wrap=True)
    else:
        table.add_column("class", overflow="fold")
        table.add_column("probability", justify="right", no_wrap=True)
    for (name, top), row in zip(answers, cells, strict=True):
        if wide:
            table.add_row(Text(printable(name)), *map(Text, row))
            continue
        for rank, p in enumerate(top):
            shown = Text(printable(name) if rank == 0 else "")
            table.add_row(shown, Text(printable(p.name)), f"{p.probability:.1%}")
        table.add_section()
    out.print(table)


def describe_classes(classifier: "Classifier | OnnxClassifier") -> str:
    """Return the classes that the model chooses from, whatever a picture shows."""
    classes = classifier.classes
    shown = ", ".join(classes[:SHOWN_CLASSES])
    more = f", … ({len(classes):,} classes)" if len(classes) > SHOWN_CLASSES else ""
    return f"Classes of {classifier.source or 'the model'}: {shown}{more}"
