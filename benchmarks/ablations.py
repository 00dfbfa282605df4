"""Ablation of a preset: train without each of its parts, with several seeds.

    python benchmarks/ablations.py RECORD_FOLDER --preset fast --seeds 0 1 2

Appends each finished run to runs.jsonl and prints a table of validation accuracy at the end; runs
already in the file are skipped. The test split is not used.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from vitrail.cli.process import keep_freed_memory
from vitrail.config.presets import get_preset
from vitrail.config.settings import Config
from vitrail.model.layers import ConvStem
from vitrail.model.vit import VisionTransformer
from vitrail.training import optim
from vitrail.training.run import EpochEnd, Run
from vitrail.training.run_folder import new_folder

Change = Callable[[Config], Config]


def part(name: str, **fields: Any) -> Change:
    """Return a function that changes fields of one section of a configuration."""
    return lambda config: dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields)}
    )


def unchanged(config: Config) -> Config:
    """Return the recipe unchanged."""
    return config


def nothing(*_: Any, **__: Any) -> tuple[()]:
    """Replace a function. (A Mock would keep its arguments, e.g. the tokens of every step.)"""
    return ()


VARIANTS: dict[str, Change] = {
    "as it is": unchanged,
    "AdamW for all weights, rate 0.001": part("training", optimizer="adamw", learning_rate=1e-3),
    "AdamW for all weights, rate 0.003": part("training", optimizer="adamw", learning_rate=3e-3),
    "half Muon's rate": lambda config: part(
        "training", muon_learning_rate=config.training.muon_learning_rate / 2
    )(config),
    "one rate for vectors and head": unchanged,
    "first kernels random, not whitened": unchanged,
    "kernels random, not partly identity": unchanged,
    "patch stem": part("model", stem="patch", stem_channels=(), stem_pools=()),
    "learned positions": part("model", position="learned"),
    "class token": part("model", pool="cls"),
    "no label smoothing": part("training", label_smoothing=0.0),
    "random flip": part("augment", flip="random"),
    "no crop, no flip": part("augment", crop_padding=0, flip="none"),
    "strong augmentation to the end": part("augment", strong_until=1.0),
    "crop and flip only": part("augment", randaugment_ops=0, random_erasing=0.0),
    "no CutMix": part("augment", cutmix=0.0),
    "one block": part("model", n_layers=1),
    "convolutions instead of blocks": part(
        "model", stem_channels=(64, 64, 256, 256, 256), stem_pools=(1, 3)
    ),
}
PATCHES = {  # changes for which there is no setting
    "one rate for vectors and head": mock.patch.object(optim, "VECTOR_RATE", 1),
    "first kernels random, not whitened": mock.patch.object(ConvStem, "whiten", nothing),
    "kernels random, not partly identity": mock.patch.object(nn.init, "dirac_", nothing),
    "convolutions instead of blocks": mock.patch.object(VisionTransformer, "run_blocks", nothing),
}


@dataclass
class Options:
    """The preset, its variants, and the folder of the results."""

    record: tyro.conf.Positional[Path]
    preset: str = "fast"
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = None
    num_train_images: int | None = None
    data_path: Path = Path("data")


def score(options: Options, name: str, seed: int) -> dict[str, Any]:
    """Train once and return the metrics of the last epoch."""
    config = VARIANTS[name](get_preset(options.preset))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, data_path=options.data_path, num_train_images=options.num_train_images
        ),
        training=dataclasses.replace(
            config.training, epochs=options.epochs or config.training.epochs
        ),
        run=dataclasses.replace(config.run, seed=seed),
    )
    with tempfile.TemporaryDirectory() as folder, PATCHES.get(name, contextlib.nullcontext()):
        run = Run.start(config, new_folder(Path(folder), "", options.preset))
        ends = [event for event in run.train() if isinstance(event, EpochEnd)]
    return {"variant": name, "seed": seed, **ends[-1].row}


def report(rows: list[dict[str, Any]]) -> None:
    """Print the accuracy of each variant and its difference from the full recipe."""
    table = Table(title="Validation accuracy in %", title_justify="left")
    for column in ("variant", "runs", "accuracy", "deviation", "difference", "seconds"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    full = [100 * row["validation_accuracy"] for row in rows if row["variant"] == "as it is"]
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        if not own:
            continue
        accuracies = [100 * row["validation_accuracy"] for row in own]
        mean = statistics.fmean(accuracies)
        deviation = f"{statistics.stdev(accuracies):.2f}" if len(own) > 1 else ""
        difference = f"{mean - statistics.fmean(full):+.2f}" if full else ""
        seconds = f"{statistics.median(row['seconds'] for row in own):.0f}"
        table.add_row(name, str(len(own)), f"{mean:.2f}", deviation, difference, seconds)
    Console().print(table)


def main() -> None:
    """Train the runs that are missing from the record, and print the table."""
    options = tyro.cli(Options)
    for name in options.variants:
        if name not in VARIANTS:
            sys.exit(f"no variant {name!r}: give one of {', '.join(VARIANTS)}")
    keep_freed_memory()
    options.record.mkdir(parents=True, exist_ok=True)
    record = options.record / "runs.jsonl"
    rows = read_lines(record)
    for seed in options.seeds:  # all variants seed by seed, so that a slow hour slows them all
        for name in options.variants:
            if not any((row["variant"], row["seed"]) == (name, seed) for row in rows):
                rows.append(score(options, name, seed))
                with record.open("a") as lines:
                    lines.write(json.dumps(rows[-1]) + "\n")
                print(f"{name}, seed {seed}: {rows[-1]['validation_accuracy']:.2%}", flush=True)
    report(rows)


def read_lines(record: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    lines = record.read_text().splitlines() if record.exists() else []
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
