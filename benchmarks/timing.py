"""What the benchmarks share: interleaved rounds, medians, one table, one JSON line."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vitrine.config import Config
from vitrine.environment import describe_environment
from vitrine.run import Run
from vitrine.training.loop import train_step


def training(config: Config, steps: int) -> Callable[[], float]:
    """Return a function that makes some updates as ``vitrine train`` does; images per second."""
    with TemporaryDirectory() as folder:
        run = Run.start(config, Path(folder))
    done = 0

    def measure() -> float:
        nonlocal done
        began, images = time.perf_counter(), 0
        for _ in range(steps):
            batch = run.batches(done)
            train_step(run.state, run.state.model, batch, run.config)
            images, done = images + len(batch.labels_B), done + 1
        return images / (time.perf_counter() - began)

    return measure


def interleave(
    contestants: Mapping[str, Callable[[], float]], *, rounds: int
) -> dict[str, list[float]]:
    """Call each contestant once a round, A B A B, after one round that is not counted.

    A contestant measures itself and returns its images per second, so that a machine that grows
    slower or faster meanwhile treats all alike.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, measure in contestants.items():
            speed = measure()
            if number:
                speeds[name].append(speed)
    return speeds


def report(title: str, speeds: Mapping[str, list[float]], **about: Any) -> None:
    """Print the table, and everything as one JSON object on the last line."""
    table = Table(title=title, title_justify="left")
    for column in ("", "images/s", "least", "most", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    first = next(iter(medians.values()))
    for name, values in speeds.items():
        figures = (medians[name], min(values), max(values))
        table.add_row(name, *(f"{f:,.0f}" for f in figures), f"{medians[name] / first:.2f}")
    Console().print(table)
    machine = describe_environment(torch.device("cpu"), "")
    kept = {name: machine[name] for name in ("versions", "system", "processor", "threads")}
    print(json.dumps({"title": title, **about, "images_per_second": speeds, "machine": kept}))
