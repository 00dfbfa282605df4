"""``vitrail test``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from vitrail.cli.console import out, say
from vitrail.cli.options import ModelWord, load_model, with_word
from vitrail.cli.parsing import parse
from vitrail.config.model import require_range

if TYPE_CHECKING:
    from vitrail.evaluation.metrics import Metrics
    from vitrail.inference.classifier import Classifier

PROG = "vitrail test"


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class TestOptions(ModelWord):
    """Score a model on a data set: its own one unless another is named."""

    __test__ = False  # the name is not pytest's

    dataset: Literal["shapes", "cifar10", "cifar100", "folder"] | None = None
    """Data set; the one the model was trained on unless given."""
    data_path: Path | None = None
    """Where the data are; the training's place unless given."""
    split: Literal["test", "validation", "train"] = "test"
    """Which split to score."""
    num_test_images: int | None = None
    """Score the first so many test images only; all of them unless given."""
    num_workers: int = 2
    """Threads that decode picture files; 0 decodes one at a time, like 1."""
    batch_size: int = 500
    """Images at a time."""
    json: bool = False
    """Print JSON on standard output and nothing else."""
    output_path: Path | None = None
    """Folder for the pictures and metrics.json; beside the model unless given."""

    def __post_init__(self) -> None:
        require_range(self, "batch_size num_test_images", 1)
        require_range(self, "num_workers", 0)


def command(words: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail test``."""
    options = with_word(parse(TestOptions, words, prog=prog))
    classifier = load_model(options)
    scored = score(classifier, options)
    if options.json:
        print(json.dumps(scored.metrics.to_json()))
    else:
        show(scored.metrics)
        say(f"pictures and metrics.json in {scored.folder}/")
    return scored.report_problems()


class Scored(NamedTuple):
    """What a test measured, where it was written, and which pictures could not be drawn."""

    metrics: "Metrics"
    folder: Path
    problems: list[str]

    def report_problems(self) -> int:
        """Say which pictures are missing, if any; return the exit code."""
        for problem in self.problems:
            say(f"vitrail: {problem}")
        return 1 if self.problems else 0


def score(classifier: "Classifier", options: TestOptions) -> Scored:
    """Measure the model and write what was measured."""
    from vitrail.errors import ConfigError
    from vitrail.evaluation.metrics import measure, predict_logits
    from vitrail.evaluation.plots import plot_metrics
    from vitrail.runtime.files import write_json
    from vitrail.training.run import load_split
    from vitrail.training.run_folder import log_test_use_of

    given = {n: getattr(options, n) for n in ("dataset", "data_path", "num_workers")}
    changes = {name: value for name, value in given.items() if value is not None}
    changes["num_test_images"] = options.num_test_images
    images = load_split(classifier, options.split, **changes)
    if images.classes != classifier.classes:
        dataset = options.dataset or classifier.config.data.dataset
        raise ConfigError(
            f"{dataset} has the classes {', '.join(images.classes[:4])}…, "
            f"the model {', '.join(classifier.classes[:4])}…: give the data it was trained for"
        )
    folder = options.output_path or default_folder(Path(classifier.source), options.split)
    if options.split == "test":
        note = log_test_use_of(classifier.source, folder, "vitrail test", len(images))
        if note:
            say(note)
    logits_BY = predict_logits(
        classifier.model, images, mean=classifier.mean, std=classifier.std,
        device=classifier.device, batch_size=options.batch_size,
    )  # fmt: skip
    metrics = measure(logits_BY, images.labels_B, classes=classifier.classes)
    write_json(folder / "metrics.json", metrics.to_json())
    return Scored(metrics, folder, plot_metrics(metrics, folder))


def default_folder(source: Path, split: str) -> Path:
    """Return where a test's files go: into the run folder, else under output/."""
    from vitrail.training.run_folder import is_run_folder

    return source / split if is_run_folder(source) else Path("output") / f"{source.stem}-{split}"


def show(metrics: "Metrics") -> None:
    """Print the tables."""
    from vitrail.evaluation.tables import confusion_table, metrics_table

    out.print(metrics_table(metrics))
    out.print(confusion_table(metrics))
