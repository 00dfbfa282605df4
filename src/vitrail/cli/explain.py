"""``vitrail explain``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.cli.console import say, tell
from vitrail.cli.explain_options import (
    ALL,
    PROG,
    ExplainOptions,
    check,
    check_drawing,
    list_methods,
    name_files,
    read_numbers,
    read_query,
)
from vitrail.cli.options import STDIN, list_pictures, load_model
from vitrail.cli.parsing import parse
from vitrail.errors import ConfigError, PictureError

if TYPE_CHECKING:
    from vitrail.explain.explanation import Explanation, Subject
    from vitrail.explain.methods import MapSettings
    from vitrail.inference.classifier import Classifier
    from vitrail.model import VisionTransformer


def command(words: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail explain``."""
    options = parse(ExplainOptions, words, prog=prog)
    check(options)
    names = list_pictures(options.pictures)
    classifier = load_model(options)
    if options.scoring.score:
        from vitrail.cli.scoring import score

        return score(classifier, options)
    return draw_all(classifier, names, options)


def draw_all(classifier: "Classifier", names: Sequence[str], options: ExplainOptions) -> int:
    """Explain the pictures that can be read; report what was drawn, and where."""
    subjects, broken = read_subjects(classifier, names, options)
    if broken and not subjects:
        raise PictureError(broken[0])
    for message in broken:
        say(f"vitrail: {message}")
    paths = name_files(options, [subject.name for subject in subjects])
    check_drawing(options, page=any(path.suffix.lower() == ".html" for path in paths))
    for subject, path in zip(subjects, paths, strict=True):
        draw(classifier, subject, path, options)
    return 1 if broken else 0


def draw(classifier: "Classifier", subject: "Subject", path: Path, options: ExplainOptions) -> None:
    """Explain one picture and report what was drawn."""
    from vitrail.evaluation.tables import printable
    from vitrail.explain.sheet import Look, save

    explanation = explain_one(classifier, subject, options)
    save(explanation, path, Look(**vars(options.drawing)))
    last = explanation.frames[-1]
    style = {True: "green", False: "bold red", None: ""}[last.right]
    tell(f"{printable(subject.name)}: {printable(last.says)}", style=style)
    size = f"{path.stat().st_size / 1000:,.0f} kB"
    tell(f"{printable(str(path))}: {describe(explanation, path)}, {size}")


def describe(explanation: "Explanation", path: Path) -> str:
    """Return what a file holds."""
    if path.suffix.lower() == ".html":
        return "a page with every method, layer and head"
    titles, what = explanation.titles, "map" if path.suffix.lower() == ".png" else "frame"
    if len(titles) == 1:
        return f"1 {what}, {titles[0]}"
    return f"{len(titles)} {what}s, {titles[0]} to {titles[-1]}"


def explain_one(
    classifier: "Classifier", subject: "Subject", options: ExplainOptions
) -> "Explanation":
    """Compute the maps that the flags ask for."""
    from vitrail.explain.explanation import choose, compare, explain

    methods = list_methods(options.method)
    if len(methods) > 1:
        if options.frames is not None:
            raise ConfigError("with several methods each is one frame: leave out --frames")
        settings = [make_settings(options, method) for method in methods]
        return compare(subject, settings, class_name=options.class_name)
    asked = methods[0] if methods else None
    method, kind = choose(asked, options.frames)  # type: ignore[arg-type]
    settings_one = make_settings(options, method)
    checkpoints = list_checkpoints(classifier, kind == "training", options.device)
    return explain(
        subject,
        settings_one,
        kind=options.frames,
        class_name=options.class_name,
        checkpoints=checkpoints,
    )


def make_settings(options: ExplainOptions, method: str) -> "MapSettings":
    """Return the settings of one method; of several, each gets those that it supports."""
    from vitrail.explain.methods import MapSettings
    from vitrail.explain.settings import SERVED

    asked = {
        "fusion": options.fusion,
        "discard_ratio": options.discard_ratio,
        "query": read_query(options.query),
        "layers": read_numbers("layers", options.layers),
        "heads": read_numbers("heads", options.heads),
    }
    if "," in (options.method or "") or options.method == ALL:
        asked = {name: value for name, value in asked.items() if name in SERVED[method]}  # type: ignore[index]
    return MapSettings(method=method, **asked)  # type: ignore[arg-type]


def list_checkpoints(
    classifier: "Classifier", wanted: bool, device: str
) -> "list[tuple[str, VisionTransformer]]":
    """Load all checkpoints of the run, with their epochs as titles, where they are wanted."""
    from vitrail.training.run_folder import is_run_folder, read_rows
    from vitrail.weights.pretrained import load

    source = Path(classifier.source)
    if not wanted or not is_run_folder(source):
        return []
    epochs = {row["step"]: row["epoch"] for row in read_rows(source)}
    loaded = []
    for folder in sorted((source / "checkpoints").glob("step-*")):
        number = folder.name.removeprefix("step-")
        if not number.isdecimal():
            continue
        step = int(number)
        title = f"epoch {epochs[step]}" if step in epochs else f"update {step}"
        loaded.append((title, load(folder, device=device).model))
    return loaded


def read_subjects(
    classifier: "Classifier", names: Sequence[str], options: ExplainOptions
) -> "tuple[list[Subject], list[str]]":
    """Read the pictures; return them, and the errors of those that cannot be read."""
    if options.index is not None:
        return [indexed(classifier, options)], []
    subjects, broken = [], []
    for name in names:
        try:
            if name == STDIN:
                subjects.append(classifier.subject(sys.stdin.buffer.read(), name="stdin"))
            else:
                subjects.append(classifier.subject(name))
        except PictureError as error:
            broken.append(str(error))
    return subjects, broken


def indexed(classifier: "Classifier", options: ExplainOptions) -> "Subject":
    """Return one image of the model's data, with its label."""
    from PIL import Image

    from vitrail.training.run import load_split
    from vitrail.training.run_folder import log_test_use_of
    from vitrail.weights.pretrained import of_model_size

    split, index = options.scoring.split, options.index
    assert index is not None
    images = load_split(classifier, split, **options.scoring.data)
    if not 0 <= index < len(images):
        raise ConfigError(f"--index is {index}: give 0 to {len(images) - 1} ({split} images)")
    if split == "test":
        purpose = f"image {index} explained"
        note = log_test_use_of(classifier.source, options.folder, purpose, 1)
        if note:
            say(note)
    raw_HWC = images.raw_BCHW[index].expand(3, -1, -1).permute(1, 2, 0).numpy()
    label = images.classes[int(images.labels_B[index])]
    # As a picture, since the axes of a small array may be ambiguous.
    picture, name = Image.fromarray(raw_HWC), f"{split}-{index}"
    return of_model_size(classifier).subject(picture, name=name, label=label)
