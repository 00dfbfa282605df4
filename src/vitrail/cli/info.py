"""``vitrail info``."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from vitrail.cli.console import out, print_err, print_out, waiting
from vitrail.cli.parsing import parse
from vitrail.config.files import to_json
from vitrail.config.presets import PRESETS
from vitrail.errors import CheckpointError, printable
from vitrail.weights import bundled

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@dataclass(frozen=True)
class InfoOptions:
    """Show the presets, the bundled models, the runs and this machine; or describe one model."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """Model to describe: a run folder, weights, a bundled name or hf:OWNER/NAME."""
    n_attention_heads: int | None = None
    """Number of attention heads, for weights whose files do not record it."""
    output_path: Path = Path("output")
    """Folder that contains the run folders."""
    json: bool = False
    """Print JSON on standard output."""


def command(args: Sequence[str]) -> int:
    """Run ``vitrail info``."""
    options = parse(InfoOptions, args, prog="vitrail info")
    if options.model is None:
        return _show_all(options)
    from vitrail.weights.pretrained import load, read

    heads = options.n_attention_heads
    with waiting("loading the model"):
        classifier = load(options.model, n_attention_heads=heads, device="cpu")
        metrics = read(options.model, n_attention_heads=heads).info.metrics
    facts = _read_facts(options.model, metrics) | _describe_model(classifier)
    if options.json:
        print(json.dumps(facts | {"settings": to_json(classifier.config)}))
    else:
        _show_model(classifier, facts)
    return 0


def _show_all(options: InfoOptions) -> int:
    """Print the machine, the presets, the bundled models and the runs; return the exit code."""
    with waiting("loading PyTorch"):
        machine = _describe_machine()
    presets = [
        {"name": name, "what": preset.summary, "expect": preset.expect}
        for name, preset in PRESETS.items()
    ]
    models = [_describe_bundled(name) for name in bundled.names()]
    runs, corrupt = _list_runs(options.output_path)
    if options.json:
        parts = {"machine": machine, "presets": presets, "bundled": models, "runs": runs}
        print(json.dumps(parts))
    else:
        _print_table("This machine", machine.items())
        _print_rows("Presets (vitrail train --preset NAME)", presets)
        _print_rows("Bundled models (vitrail predict NAME PICTURE)", models)
        if runs:
            _print_rows(f"Runs in {options.output_path}/", runs)
        else:
            print_out(f"No runs in {options.output_path}/ yet: vitrail train --preset quick")
    for problem in corrupt:
        print_err(f"vitrail: {problem}")
    return 1 if corrupt else 0


def _describe_machine() -> dict[str, Any]:
    """Return versions, device and precision."""
    from vitrail.runtime.hardware import choose_device, choose_precision, describe_environment

    device = choose_device("auto")
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    about = describe_environment(device, precision)
    names = ("system", "processor", "threads", "device", "precision")
    return {**about["versions"], **{name: about[name] for name in names}}


def _describe_bundled(name: str) -> dict[str, Any]:
    """Return what a bundled model's card says."""
    card = bundled.read_card(name)
    return {
        "name": name,
        "parameters": card.parameters,
        "data": card.data,
        "test": card.test_accuracy,
        "recipe": card.recipe,
        "record": card.record,
    }


def _list_runs(output_path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the runs in a folder with their scores, and what is wrong with corrupt ones."""
    from vitrail.training.run_folder import read_rows
    from vitrail.weights.checkpoint import read_json_object

    runs: list[dict[str, Any]] = []
    corrupt: list[str] = []
    for folder in sorted(path.parent for path in output_path.glob("*/checkpoints")):
        row: Mapping[str, Any] = {}
        data: Mapping[str, Any] = {}
        result: Mapping[str, Any] = {}
        epochs: int | str = "corrupt"
        try:
            rows = read_rows(folder)
            row = rows[-1] if rows else {}
            files = {name: folder / f"{name}.json" for name in ("config", "result")}
            found = {n: read_json_object(path) for n, path in files.items() if path.is_file()}
            data, result = found.get("config", {}).get("data") or {}, found.get("result", {})
            epochs = row.get("epoch", 0)
        except CheckpointError as error:
            corrupt.append(str(error))
        tested = (result.get("test") or {}).get("accuracy", row.get("test_accuracy"))
        runs.append({
            "run": folder.name, "epochs": epochs, "train": row.get("train_accuracy"),
            "validation": row.get("validation_accuracy"), "test": tested,
            "data": data.get("dataset"),
        })  # fmt: skip
    return runs, corrupt


def _read_facts(model: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's accuracy and length of training, as far as its files record them."""
    from vitrail.weights.checkpoint import read_json_object

    if model in bundled.names():
        card = bundled.read_card(model)
        validation = card.validation_accuracy
        on_validation = {} if validation is None else {"validation accuracy": validation}
        return {"test accuracy": card.test_accuracy, **on_validation, "recipe": card.recipe}
    facts: dict[str, Any] = {}
    path = Path(model) / "result.json"
    result = read_json_object(path) if path.is_file() else {}
    test = result.get("test")
    if isinstance(test, dict) and isinstance(test.get("accuracy"), float):
        facts |= {"test accuracy": test["accuracy"], "test images": test.get("images")}
    if isinstance(accuracy := metrics.get("validation_accuracy"), float):
        facts["validation accuracy"] = accuracy
    if isinstance(epoch := metrics.get("epoch"), int):
        facts["epochs"] = epoch
    names = {"train_images": "training images", "finished": "finished"}
    return facts | {title: result[name] for name, title in names.items() if name in result}


def _describe_model(classifier: "Classifier") -> dict[str, Any]:
    """Return a model's data and size, and what was assumed about it."""
    config = classifier.config
    return {
        "model": classifier.source,
        "data": config.data.dataset,
        "classes": list(classifier.classes),
        "image size": list(config.model.image_hw),
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "notes": list(classifier.notes),
    }


def _show_model(classifier: "Classifier", facts: Mapping[str, Any]) -> None:
    """Print a model's scores, data and size, then the settings that have a value."""
    config = classifier.config
    classes = classifier.classes
    shown = {
        **facts,
        "classes": f"{len(classes)}: {', '.join(classes)}" if classes else "none",
        "image size": "{} x {} pixels".format(*config.model.image_hw),
    }
    hidden = ("model", "notes")
    notes = (("note", note) for note in classifier.notes)
    rows = (pair for pair in shown.items() if pair[0] not in hidden)
    _print_table(classifier.source, [*rows, *notes])
    if classes:
        _show_verdict(classifier)
    settings = {**vars(config.model), **vars(config.data)}.items()
    given = [(name, str(value)) for name, value in settings if value not in (None, ())]
    _print_table("Settings", given)


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
    title = (
        f"Maps (vitrail explain --score, {verdict.images} {verdict.split} images): does a method "
        "beat the controls, and depend on the model and on the class?"
    )
    columns = "method", "SRG", "controls", "model", "class"
    _print_table(title, rows, *columns)
    print_out(f"{verdict.trust}\n")


def _print_rows(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print a table of rows with the same keys."""
    _print_table(title, [tuple(row.values()) for row in rows], *rows[0])


def _print_table(title: str, rows: Iterable[tuple[object, ...]], *columns: str) -> None:
    """Print a table without a frame; without ``columns``, it lists names and values."""
    table = Table(
        title=Text(printable(title)), title_justify="left", show_edge=False, pad_edge=False,
        show_header=bool(columns),
    )  # fmt: skip
    for column in columns or ("", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(_format(cell))) for cell in row))
    out.print(table, "")


def _format(value: object) -> str:
    """Return a value as text; a float is an accuracy."""
    if isinstance(value, float):
        return f"{value:.2%}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)
