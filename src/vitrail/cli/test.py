"""``vitrail test``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from vitrail.cli.console import out, print_err, progress_bar, waiting
from vitrail.cli.options import (
    DataOptions,
    ModelArgument,
    load_labeled,
    load_model,
    log_test_use,
    name_of,
)
from vitrail.cli.parsing import parse
from vitrail.config.settings import require_range

if TYPE_CHECKING:
    from vitrail.evaluation.metrics import Metrics
    from vitrail.inference.classifier import Classifier


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class TestOptions(ModelArgument):
    """Evaluate a model on a dataset; by default, on the test split of its own.

    For example:
      vitrail test
      vitrail test output/quick --split validation --json
    """

    __test__ = False  # not a test, despite its name

    num_test_images: int | None = None
    """Use only N test images (stratified, always the same ones). Default: all of them."""
    num_workers: int = 2
    """Threads that decode picture files; 0 and 1 decode one at a time."""
    batch_size: int = 500
    """Images per batch."""
    tta: bool = False
    """Test-time augmentation: average the logits of six views (mirrored and shifted by a pixel)."""
    json: bool = False
    """Print JSON on standard output, and nothing else."""
    output_path: Path | None = None
    """Folder for the plots and metrics.json. Default: in the run folder, else under output/."""
    data: DataOptions = field(default_factory=lambda: DataOptions(split="test"))

    def __post_init__(self) -> None:
        require_range(self, "batch_size num_test_images", 1)
        require_range(self, "num_workers", 0)


def command(args: Sequence[str]) -> int:
    """Run ``vitrail test``."""
    options = parse(TestOptions, args, prog="vitrail test")
    from vitrail.training.run_folder import is_run_folder

    classifier = load_model(options)
    source, split = Path(classifier.source), options.data.split
    default = (
        source / split
        if is_run_folder(source)
        else Path("output") / f"{name_of(classifier.source)}-{split}"
    )
    folder = options.output_path or default
    metrics, code = score(classifier, options, folder)
    if options.json:
        print(json.dumps(metrics.to_json()))
    else:
        show(metrics, folder)
    return code


def score(classifier: "Classifier", options: TestOptions, folder: Path) -> "tuple[Metrics, int]":
    """Evaluate the model, write the results; return them and the exit code."""
    from vitrail.evaluation.metrics import SixViews, measure, predict_logits
    from vitrail.evaluation.report import plot_metrics
    from vitrail.runtime.files import write_json

    split = options.data.split
    given = {name: getattr(options, name) for name in ("num_workers", "num_test_images")}
    with waiting("loading the data"):
        images = load_labeled(classifier, options.data, **given)
    dataset = options.data.dataset or classifier.config.data.dataset
    purpose = "vitrail test --tta" if options.tta else "vitrail test"
    log_test_use(classifier, split, folder, purpose, len(images))
    print_err(f"{classifier.source}: {len(images):,} {split} images of {dataset}")
    model = SixViews(classifier.model) if options.tta else classifier.model
    with progress_bar("testing", len(images)) as advance:
        hook = model.register_forward_hook(lambda _, inputs, __: advance(len(inputs[0])))
        logits_BY = predict_logits(
            model, images, mean=classifier.mean, std=classifier.std,
            device=classifier.device, batch_size=options.batch_size,
        )  # fmt: skip
        hook.remove()
    metrics = measure(
        logits_BY, images.labels_B, classes=classifier.classes,
        calibration=classifier.calibration, tta=options.tta,
    )  # fmt: skip
    write_json(folder / "metrics.json", metrics.to_json())
    missing = plot_metrics(metrics, folder, f"{name_of(classifier.source)}, {dataset}, {split}")
    for problem in missing:
        print_err(f"vitrail: {problem}")
    return metrics, 1 if missing else 0


def show(metrics: "Metrics", folder: Path) -> None:
    """Print the tables."""
    from vitrail.evaluation.report import confusion_table, metrics_table

    out.print(metrics_table(metrics))
    out.print(confusion_table(metrics))
    print_err(f"plots and metrics.json in {folder}/")
