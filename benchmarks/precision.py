"""Compare training in bfloat16 and float32: the loss of every update, with several seeds.

    python benchmarks/precision.py RECORD_FOLDER --epochs 2 --num_train_images 20000

Plots the running mean of the losses and prints the difference between precisions and between
seeds. The test split is not used.
"""

import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from vitrail.cli.process import keep_freed_memory
from vitrail.config.presets import get_preset
from vitrail.data.batches import Batches
from vitrail.data.datasets import load_data
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import rng
from vitrail.runtime.files import write_json
from vitrail.training.loop import train
from vitrail.training.state import TrainingState

Precision = Literal["float32", "bfloat16"]
FORMATS: tuple[Precision, ...] = ("float32", "bfloat16")


@dataclass
class Options:
    """The preset, its training, and the folder of the results."""

    record: tyro.conf.Positional[Path]
    preset: str = "reference"
    epochs: int = 2
    num_train_images: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    data_path: Path = Path("data")
    window: int = 40
    """Number of updates averaged for one point of the curve."""


def losses(options: Options, precision: Precision, seed: int) -> list[float]:
    """Train and return the loss of every update."""
    config = get_preset(options.preset)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, n_classes=10),
        data=dataclasses.replace(
            config.data, data_path=options.data_path, num_train_images=options.num_train_images
        ),
        training=dataclasses.replace(
            config.training, epochs=options.epochs, precision=precision, warmup_epochs=None
        ),
    )
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
    images = load_data(config.data, ["train"]).images["train"]
    device = torch.device("cpu")
    batches = Batches(images, config, device=device)
    with rng.seeded(seed, "init", device=device):
        model = VisionTransformer(config.model)
    state = TrainingState.start(model, config.training)
    return [update.loss for update in train(state, batches, config)]


def main() -> None:
    """Train with every seed and precision; write curves.json and curves.png."""
    options = tyro.cli(Options)
    keep_freed_memory()
    curves: dict[str, list[list[float]]] = {name: [] for name in FORMATS}
    for seed in options.seeds:
        for name in FORMATS:
            curves[name].append(losses(options, name, seed))
            print(f"{name} seed {seed}: last {curves[name][-1][-1]:.4f}", file=sys.stderr)
    kernel = np.ones(options.window) / options.window
    smooth = {k: np.stack([np.convolve(c, kernel, "valid") for c in v]) for k, v in curves.items()}
    between_formats = np.abs(smooth["bfloat16"] - smooth["float32"])
    reference = smooth["float32"]
    between_seeds = reference.max(axis=0) - reference.min(axis=0)
    last = {
        name: [statistics.fmean(c[-options.window :]) for c in curve]
        for name, curve in curves.items()
    }
    result = {
        "window": options.window,
        "mean_distance_between_formats": float(between_formats.mean()),
        "largest_distance_between_formats": float(between_formats.max()),
        "mean_range_of_seeds": float(between_seeds.mean()),
        "largest_range_of_seeds": float(between_seeds.max()),
        "last_loss": last,
    }
    print(json.dumps(result, indent=1))
    options.record.mkdir(parents=True, exist_ok=True)
    rounded = {name: [[round(x, 4) for x in c] for c in curve] for name, curve in curves.items()}
    write_json(options.record / "curves.json", {**result, "losses": rounded})
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    updates = np.arange(reference.shape[1]) + options.window
    for number, (label, all_seeds) in enumerate(smooth.items()):
        lines = axes.plot(updates, all_seeds.T, color=f"C{number}", linewidth=1, alpha=0.8)
        lines[0].set_label(f"{label}, {len(all_seeds)} seeds")
    axes.set_xlabel("update")
    axes.set_ylabel(f"training loss, mean of {options.window} updates")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(options.record / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
