"""``vitrail info``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from vitrail.cli.console import out, print_err, print_out
from vitrail.cli.parsing import parse
from vitrail.config.presets import PRESETS
from vitrail.errors import CheckpointError, printable
from vitrail.weights import bundled

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier

PROG = "vitrail info"


@dataclass(frozen=True)
class InfoOptions:
    """Show the presets, the bundled models, the runs and this machine; or describe one model."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """Model to describe: a run folder, weights, a bundled name or hf:OWNER/NAME."""
    n_attention_heads: int | None = None
    """Number of attention heads, for weights whose files do not record it."""
    output_path: Path = Path("output")
    """Folder that contains the run folders."""


def command(args: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail info``."""
    options = parse(InfoOptions, args, prog=prog)
    if options.model is None:
        _show_machine()
        _show_presets()
        _show_bundled()
        return _show_runs(options.output_path)
    from vitrail.weights.pretrained import load, read

    heads = options.n_attention_heads
    classifier = load(options.model, n_attention_heads=heads, device="cpu")
    metrics = read(options.model, n_attention_heads=heads).info.metrics
    _show_model(classifier, _read_facts(options.model, metrics))
    return 0


def _show_machine() -> None:
    """Print versions, device and precision."""
    from vitrail.runtime.hardware import choose_device, choose_precision, describe_environment

    device = choose_device("auto")
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    about = describe_environment(device, precision)
    names = ("system", "processor", "threads", "device", "precision")
    _print_table(
        "This machine", [*about["versions"].items(), *((name, about[name]) for name in names)]
    )


def _show_presets() -> None:
    """Print the presets with what to expect from each."""
    rows = [(name, preset.summary, preset.expect) for name, preset in PRESETS.items()]
    _print_table("Presets (vitrail train --preset NAME)", rows, "name", "what", "expect")


def _show_bundled() -> None:
    """Print the bundled models."""
    columns = "name", "parameters", "data", "test accuracy", "recipe", "record"
    rows = [
        (name, f"{card.parameters:,}", card.data, f"{card.test_accuracy:.2%}", card.recipe,
         card.record)
        for name, card in ((name, bundled.read_card(name)) for name in bundled.names())
    ]  # fmt: skip
    _print_table("Bundled models (vitrail predict --model_path NAME)", rows, *columns)


def _show_runs(output_path: Path) -> int:
    """Print the runs in a folder with their scores; return 1 if one of them is corrupt, else 0."""
    from vitrail.training.run_folder import read_rows

    table: list[tuple[str, ...]] = []
    corrupt: list[str] = []
    for folder in sorted(path.parent for path in output_path.glob("*/checkpoints")):
        try:
            rows = read_rows(folder)
        except CheckpointError as error:
            corrupt.append(str(error))
            table.append((folder.name, "corrupt", "-", "-", "-"))
            continue
        row: Mapping[str, Any] = rows[-1] if rows else {}
        scores = [row.get(f"{split}_accuracy") for split in ("train", "validation", "test")]
        cells = ["-" if score is None else f"{score:.2%}" for score in scores]
        table.append((folder.name, str(row.get("epoch", 0)), *cells))
    if table:
        columns = "run", "epochs", "train", "validation", "test (--monitor test)"
        _print_table(f"Runs in {output_path}/", table, *columns)
    else:
        print_out(f"No runs in {output_path}/ yet: vitrail train --preset quick")
    for problem in corrupt:
        print_err(f"vitrail: {problem}")
    return 1 if corrupt else 0


def _read_facts(model: str, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return a model's accuracy and length of training, as far as its files say."""
    from vitrail.weights.checkpoint import read_json_object

    if model in bundled.names():
        card = bundled.read_card(model)
        return {
            "test accuracy": f"{card.test_accuracy:.2%}",
            "validation accuracy": f"{card.validation_accuracy:.2%}",
            "recipe": card.recipe,
        }
    facts: dict[str, str] = {}
    path = Path(model) / "result.json"
    test = read_json_object(path).get("test") if path.is_file() else None
    if isinstance(test, dict) and isinstance(test.get("accuracy"), float):
        facts["test accuracy"] = f"{test['accuracy']:.2%} of {test.get('images')} images"
    if isinstance(accuracy := metrics.get("validation_accuracy"), float):
        facts["validation accuracy"] = f"{accuracy:.2%}"
    if isinstance(epoch := metrics.get("epoch"), int):
        facts["epochs"] = str(epoch)
    return facts


def _show_model(classifier: "Classifier", facts: Mapping[str, str]) -> None:
    """Print a model's scores, data and size, then all settings."""
    config = classifier.config
    height, width = config.model.image_hw
    parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
    first = {
        **facts,
        "data": config.data.dataset,
        "classes": f"{len(classifier.classes)}: {', '.join(classifier.classes)}",
        "image size": f"{height} x {width} pixels",
        "parameters": f"{parameters:,}",
    }
    notes = (("note", note) for note in classifier.notes)
    _print_table(classifier.source, [*first.items(), *notes])
    _show_verdict(classifier)
    _print_table("Settings", [*vars(config.model).items(), *vars(config.data).items()])


def _show_verdict(classifier: "Classifier") -> None:
    """Print which maps of the model can be trusted, if they were scored."""
    verdict = classifier.verdict
    if verdict is None:
        print_out(f"maps not scored: vitrail explain --score --model_path {classifier.source}\n")
        return
    words = {True: "yes", False: "no", None: "not tested"}
    rows = [
        (
            badge.method,
            f"{badge.srg:.3f} ({badge.low:.3f} to {badge.high:.3f})",
            words[badge.beats_controls],
            words[badge.depends_on_model],
            words[badge.depends_on_class],
        )
        for badge in verdict.badges
    ]
    title = f"Maps (vitrail explain --score, {verdict.images} {verdict.split} images)"
    columns = "method", "SRG", "beats the controls", "depends on the model", "on the class"
    _print_table(title, rows, *columns)
    print_out(f"{verdict.trust}\n")


def _print_table(title: str, rows: Iterable[tuple[object, ...]], *columns: str) -> None:
    """Print a table without a frame; without columns, of names and values."""
    table = Table(
        title=Text(printable(title)), title_justify="left", show_edge=False, pad_edge=False,
        show_header=bool(columns),
    )  # fmt: skip
    for column in columns or ("", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    out.print(table, "")
