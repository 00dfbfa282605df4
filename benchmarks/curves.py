"""Plot accuracy over minutes of training: a line per metrics file, a color per run.

    python benchmarks/curves.py docs/pictures/curves.png "fast=records/fast/metrics-fast.jsonl" ...

A name may be given several times, for seeds. Minutes exclude start-up and evaluation; accuracy is
on validation data, or on test data if the run monitored it.
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

PUBLISHED = {"reference, 6 layers, 200 epochs": 78.31, "reference, 12 layers, 200 epochs": 82.04}


def read_curve(path: Path) -> tuple[list[float], list[float]]:
    """Return minutes and accuracy in percent after each epoch."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    watched = next(k for k in ("validation_accuracy", "test_accuracy") if k in rows[0])
    return [row["seconds"] / 60 for row in rows], [100 * row[watched] for row in rows]


def main(out: str, *curves: str) -> None:
    """Draw the plot."""
    figure = Figure(figsize=(8, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for label, accuracy in PUBLISHED.items():
        axes.axhline(accuracy, color="0.6", linestyle="--", linewidth=1)
        at = axes.get_yaxis_transform()
        words = f"{label}: {accuracy}%"
        axes.text(0.99, accuracy - 0.6, words, transform=at, ha="right", va="top", fontsize=8)
    colors: dict[str, str] = {}
    for curve in curves:
        name, path = curve.split("=", 1)
        color = colors.get(name) or f"C{len(colors)}"
        minutes, accuracies = read_curve(Path(path))
        label = None if name in colors else name
        axes.plot(minutes, accuracies, ".-", color=color, label=label)
        colors[name] = color
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
