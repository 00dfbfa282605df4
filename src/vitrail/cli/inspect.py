"""``vitrail inspect``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from vitrail.cli.console import number_table, out, print_err, waiting
from vitrail.cli.options import (
    DataOptions,
    ModelArgument,
    check_images,
    load_model,
    log_test_use,
)
from vitrail.cli.parsing import parse
from vitrail.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from vitrail.explain.inspection import HeadStatistics
    from vitrail.inference.classifier import Classifier


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class InspectOptions(ModelArgument):
    """Show what is inside a model: filters, positions, attention distance and entropy of the heads.

    For example:
      vitrail inspect output/quick
    """

    images: int = 200
    """Number of images that distance and entropy are averaged over."""
    output_path: Path = Path("output") / "inspect"
    """Folder for insides.png and insides.json."""
    json: bool = False
    """Print the numbers as JSON on standard output."""
    data: DataOptions = field(default_factory=DataOptions)


def command(args: Sequence[str]) -> int:
    """Run ``vitrail inspect``."""
    options = parse(InspectOptions, args, prog="vitrail inspect")
    check_images(options.images)
    classifier = load_model(options, needs_classes=False)
    from vitrail.explain.inspection import draw_inspection, inspect_model
    from vitrail.runtime.files import write_json

    with waiting("inspecting the model"):
        images_BCHW, missing = _load_images(classifier, options)
        insides = inspect_model(classifier.model, images_BCHW)
        numbers = insides.to_json()
        write_json(options.output_path / "insides.json", numbers)
        draw_inspection(insides, options.output_path / "insides.png")
    if options.json:
        print(json.dumps(numbers))
    elif insides.heads:
        _show(insides.heads)
    print_err(f"insides.png and insides.json in {options.output_path}/")
    if missing:
        print_err(f"vitrail: filters and positions only, since there are no images: {missing}")
    return 1 if missing else 0


def _load_images(
    classifier: "Classifier", options: InspectOptions
) -> "tuple[Tensor | None, DataError | None]":
    """Return the images to measure the heads on, or None and the reason why there are none.

    Raises:
        DataError: the data that the options name cannot be read.
    """
    from vitrail.data.images import normalize
    from vitrail.training.run_folder import load_split

    try:
        images = load_split(classifier, **options.data.to_load()).sample(options.images)
    except DataError as error:
        if options.data.changes():
            raise
        return None, error
    purpose = "vitrail inspect"
    log_test_use(classifier, options.data.split, options.output_path, purpose, len(images))
    raw_BCHW = images.raw_BCHW.to(classifier.device)
    return normalize(raw_BCHW, classifier.mean, classifier.std), None


def _show(heads: "HeadStatistics") -> None:
    """Print the distance and entropy of every head."""
    table = number_table("layer", "head", "mean distance (pixels)", "mean entropy (nats)")
    pairs = zip(
        heads.distance_BLA.mean(0).tolist(), heads.entropy_BLA.mean(0).tolist(), strict=True
    )
    for layer, rows in enumerate(pairs, 1):
        for head, (distance, entropy) in enumerate(zip(*rows, strict=True), 1):
            table.add_row(str(layer), str(head), f"{distance:.2f}", f"{entropy:.3f}")
        table.add_section()
    out.print(table)
