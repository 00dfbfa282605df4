"""``vitrail inspect``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from vitrail.cli.console import out, say
from vitrail.cli.explain_options import check_images
from vitrail.cli.options import ModelWord, load_model, with_word
from vitrail.cli.parsing import parse
from vitrail.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from vitrail.explain.inspection import HeadSummary
    from vitrail.inference.classifier import Classifier

PROG = "vitrail inspect"


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class InspectOptions(ModelWord):
    """Show what is inside a model: filters, positions, attention distance and entropy of the heads.

    For example: vitrail inspect output/quick
    """

    dataset: Literal["shapes", "cifar10", "cifar100", "folder"] | None = None
    """Data set to measure the heads on. Default: the one that the model was trained on."""
    data_path: Path | None = None
    """Folder of the data. Default: where they were for the training."""
    split: Literal["validation", "test", "train"] = "validation"
    """The split to take the images from."""
    images: int = 200
    """Number of images that distance and entropy are averaged over."""
    output_path: Path = Path("output") / "inspect"
    """Folder for insides.png and insides.json."""
    json: bool = False
    """Print the numbers as JSON on standard output."""


def command(words: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail inspect``."""
    import json

    from vitrail.explain.inspection import inspect_model
    from vitrail.explain.inspection_plot import draw_insides
    from vitrail.runtime.files import write_json

    options = with_word(parse(InspectOptions, words, prog=prog))
    check_images(options.images)
    classifier = load_model(options)
    images_BCHW, missing = load_images(classifier, options)
    insides = inspect_model(classifier.model, images_BCHW)
    numbers = insides.to_json()
    write_json(options.output_path / "insides.json", numbers)
    draw_insides(insides, options.output_path / "insides.png")
    if options.json:
        print(json.dumps(numbers))
    elif insides.heads:
        show(insides.heads)
    say(f"insides.png and insides.json in {options.output_path}/")
    if missing:
        say(f"vitrail: filters and positions only, since there are no images: {missing}")
    return 1 if missing else 0


def load_images(
    classifier: "Classifier", options: InspectOptions
) -> "tuple[Tensor | None, DataError | None]":
    """Return the images to measure the heads on, or None and the reason why there are none.

    Raises:
        DataError: the data that the options name cannot be read.
    """
    from vitrail.data.images import normalise
    from vitrail.training.run import load_split
    from vitrail.training.run_folder import log_test_use_of

    changes = {"dataset": options.dataset, "data_path": options.data_path}
    changes = {name: value for name, value in changes.items() if value is not None}
    try:
        # All test images, even if the training run used only some of them.
        every: Any = changes | {"num_test_images": None}
        images = load_split(classifier, options.split, **every).sample(options.images)
    except DataError as error:
        if changes:
            raise
        return None, error
    if options.split == "test":
        folder = options.output_path
        note = log_test_use_of(classifier.source, folder, "vitrail inspect", len(images))
        if note:
            say(note)
    raw_BCHW = images.raw_BCHW.to(classifier.device)
    return normalise(raw_BCHW, classifier.mean, classifier.std), None


def show(heads: "HeadSummary") -> None:
    """Print the distance and entropy of every head."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in ("layer", "head", "mean distance (pixels)", "mean entropy (nats)"):
        table.add_column(column, justify="right")
    pairs = zip(heads.distance_LA.tolist(), heads.entropy_LA.tolist(), strict=True)
    for layer, rows in enumerate(pairs, 1):
        for head, (distance, entropy) in enumerate(zip(*rows, strict=True), 1):
            table.add_row(str(layer), str(head), f"{distance:.2f}", f"{entropy:.3f}")
        table.add_section()
    out.print(table)
