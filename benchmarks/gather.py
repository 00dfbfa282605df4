"""Collect the data of a record from finished runs: small files and a table of means and spreads.

    python benchmarks/gather.py output/ records/NAME

Runs whose names differ only in a final ``-sN`` are seeds of the same configuration.
"""

import json
import re
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import tyro

KEPT = ("config.json", "env.json", "metrics.jsonl", "result.json", "graph_accuracy.png")
HEAD = "| run | seeds | test accuracy | seconds | images/s | epochs | device |"


def row(name: str, runs: list[Path]) -> str:
    """Return one row of the table: all seeds of one configuration."""
    results = [read(run / "result.json") for run in runs]
    device = read(runs[0] / "env.json")["device"]
    scores = [100 * result["test"]["accuracy"] for result in results]
    spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
    epochs = ", ".join(dict.fromkeys(str(result["epochs"]) for result in results))
    measured = ("seconds", "images_per_second")
    figures = [f"{mean(result[key] for result in results):,.0f}" for key in measured]
    cells = [name, str(len(runs)), f"{mean(scores):.2f}{spread}%", *figures, epochs, device]
    return f"| {' | '.join(cells)} |"


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def main(
    runs: Annotated[Path, tyro.conf.Positional], record: Annotated[Path, tyro.conf.Positional]
) -> None:
    """Copy the small files of every finished run, and write and print the table.

    Args:
        runs: a folder of run folders.
        record: the folder to fill.
    """
    groups: dict[str, list[Path]] = {}
    for path in sorted(runs.glob("*/result.json")):
        run = path.parent
        groups.setdefault(re.sub(r"-s\d+$", "", run.name), []).append(run)
        (record / run.name).mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (run / name).is_file():
                shutil.copy(run / name, record / run.name / name)
    if not groups:
        raise SystemExit(f"no finished run in {runs}: none has a result.json")
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    lines += [row(name, some) for name, some in groups.items()]
    table = "\n".join(lines)
    (record / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    tyro.cli(main, use_underscores=True)
