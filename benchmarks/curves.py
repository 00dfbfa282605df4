"""Plot CIFAR-10 accuracy against the floating-point operations of training, with published results.

    python benchmarks/curves.py docs/pictures/curves.png fast=records/fast small=records/small ...

Each folder holds config.json and a pair metrics*.jsonl, result*.json for each seed. Lines are
the validation (or monitored) accuracy of the epochs; a dot is the final test accuracy. Operations
are those of the forward and backward passes, as torch counts them.
"""

import json
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitrail.config.files import from_json, read_json
from vitrail.training.loop import count_flops

PUBLISHED = {
    "reference, 6 layers (published)": (3.5, 78.31),
    "reference, 12 layers (published)": (6.9, 82.04),
    "airbench94 (CNN, TTA)": (0.28, 94.01),
    "hiverge (CNN)": (0.27, 93.16),
    "airbench95 (CNN, TTA)": (1.36, 95.01),
    "airbench96 (CNN, TTA)": (4.9, 96.03),
    "ConvMixer-256/8": (1.1, 92.6),
    "CCT-2/3x2": (2.0, 89.17),
    "CCT-4/3x2": (2.8, 91.45),
    "CCT-7/3x2": (16.5, 93.83),
    "ViT-Lite-7/4": (14, 91.38),
    "ViT 9x192": (17, 93.58),
}
"""PFLOP of training and test accuracy in percent. Sources: nick8592/ViT-Classification-CIFAR10
(reference), KellerJordan/cifar10-airbench, hiverge/cifar10-speedrun, locuslab/convmixer-cifar10,
arXiv:2104.05704 (CCT, ViT-Lite) and arXiv:2112.13492 (ViT 9x192); operations computed from the
networks' shapes and epochs."""

LABELED_LEFT = {
    "airbench94 (CNN, TTA)": 4,
    "hiverge (CNN)": -4,
    "airbench95 (CNN, TTA)": 9,
    "CCT-7/3x2": 3,
}
"""Published results labeled on the left, and by how many points the label is raised."""


def draw_run(axes: Axes, name: str, folder: Path, color: str) -> None:
    """Draw the curves and final accuracies of a recipe's seeds."""
    model = from_json({"model": read_json(folder / "config.json")["model"]}).model
    operations = count_flops(model)[1]
    ends: dict[int, tuple[float, float]] = {}  # epochs -> PFLOP and lowest test accuracy
    for metrics in sorted(folder.glob("metrics*.jsonl")):
        result = json.loads(
            metrics.with_name(metrics.name.replace("metrics", "result", 1))
            .with_suffix(".json")
            .read_text()
        )
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        watched = next(k for k in ("validation_accuracy", "test_accuracy") if k in rows[0])
        petaflops = [row["epoch"] * result["train_images"] * operations / 1e15 for row in rows]
        axes.plot(petaflops, [100 * row[watched] for row in rows], color=color, alpha=0.4)
        final = 100 * result["test"]["accuracy"]
        axes.plot(petaflops[-1], final, "o", color=color, label=name)
        name = f"_{name}"  # a label with an underscore stays out of the legend
        epochs = rows[-1]["epoch"]
        ends[epochs] = min(ends.get(epochs, (0, 100)), (petaflops[-1], final), key=lambda e: e[1])
    for epochs, end in ends.items():
        axes.annotate(
            f"{epochs} epochs", end, (-7, 4), textcoords="offset points",
            ha="right", fontsize=8, color=color,
        )  # fmt: skip


def main(out: str, *runs: str) -> None:
    """Draw the plot."""
    figure = Figure(figsize=(8, 5.4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for index, run in enumerate(runs):
        name, folder = run.split("=", 1)
        draw_run(axes, name, Path(folder), f"C{index}")
    for name, (petaflops, accuracy) in PUBLISHED.items():
        axes.plot(petaflops, accuracy, "D", color="0.55", markersize=4)
        left = name in LABELED_LEFT
        axes.annotate(
            name, (petaflops, accuracy), (-6 if left else 6, LABELED_LEFT.get(name, 0)),
            textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=8, color="0.3",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(3e-3, 90)
    axes.set_ylim(58, 98)
    ticks = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("training operations, PFLOP")
    axes.set_ylabel("CIFAR-10 accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(
        loc="lower right",
        title="this project\nline: validation after each epoch\n"
        "(reference: test)\ndot: test at the end",
    )
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
