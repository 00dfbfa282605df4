"""``vitrine inspect``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vitrine.cli.console import out, say
from vitrine.cli.models import ModelOptions, load_model
from vitrine.cli.parsing import parse

if TYPE_CHECKING:
    from vitrine.explain.insides import Insides

PROG = "vitrine inspect"


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class InspectOptions(ModelOptions):
    """Show a model's insides: filters, positions, and how far and how widely each head looks."""

    model: Annotated[Path | None, tyro.conf.Positional] = None
    """As --model_path."""
    dataset: Literal["shapes", "cifar10", "cifar100", "folder"] | None = None
    """Whose images the heads look at; the data set the model was trained on unless given."""
    data_path: Path | None = None
    """Where the data are; the training's place unless given."""
    split: Literal["validation", "test", "train"] = "validation"
    """The split the images are of."""
    images: int = 200
    """Images that distance and entropy are averaged over."""
    output_path: Path = Path("output") / "inspect"
    """Folder for insides.png and insides.json."""
    json: bool = False
    """Print the numbers as JSON on standard output."""


def command(words: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrine inspect``."""
    import dataclasses
    import json

    from vitrine.data.images import normalise
    from vitrine.explain.insides import inspect_model
    from vitrine.explain.insides_figure import draw_insides
    from vitrine.files import write_json
    from vitrine.run import load_split
    from vitrine.run_folder import log_test_use

    options = parse(InspectOptions, words, prog=prog)
    options = dataclasses.replace(options, model_path=options.model or options.model_path)
    classifier = load_model(options)
    changes = {"dataset": options.dataset, "data_path": options.data_path}
    changes = {name: value for name, value in changes.items() if value is not None}
    # All test images, however few the training run looked at.
    changes["num_test_images"] = None
    images = load_split(classifier, options.split, **changes).sample(options.images)
    if options.split == "test":
        log_test_use(options.output_path, "vitrine inspect", len(images))
    raw_BCHW = images.raw_BCHW.to(classifier.device)
    insides = inspect_model(classifier.model, normalise(raw_BCHW, classifier.mean, classifier.std))
    numbers = insides.to_json()
    write_json(options.output_path / "insides.json", numbers)
    draw_insides(insides, options.output_path / "insides.png")
    if options.json:
        print(json.dumps(numbers))
    else:
        show(insides)
        say(f"insides.png and insides.json in {options.output_path}/")
    return 0


def show(insides: "Insides") -> None:
    """Print the distance and entropy of every head."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for column in ("layer", "head", "mean distance (pixels)", "mean entropy (nats)"):
        table.add_column(column, justify="right")
    pairs = zip(insides.distance_LA.tolist(), insides.entropy_LA.tolist(), strict=True)
    for layer, rows in enumerate(pairs, 1):
        for head, (distance, entropy) in enumerate(zip(*rows, strict=True), 1):
            table.add_row(str(layer), str(head), f"{distance:.2f}", f"{entropy:.3f}")
        table.add_section()
    out.print(table)
