"""Measure speed and memory of training, testing and explaining; alone or next to other systems.

    python benchmarks/bench.py --quick
    python benchmarks/bench.py --peers peers        (made by benchmarks/peers.sh)
    python benchmarks/bench.py --growth

docs/how-to/measure-speed.md explains the table.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from speed.compare import Bench, compare, sizes
from speed.growth import growth_json, growth_table, measure_growth, plot_growth
from speed.jobs import QUICK, REFERENCE, TITLES, Amounts, Recipe, Workload
from speed.report import below, comparison_json, comparison_table
from speed.workers import python_of
from vitrail.cli import guarded, process
from vitrail.cli.console import out, print_err
from vitrail.cli.parsing import parse, parse_known
from vitrail.config.presets import get_preset
from vitrail.config.settings import require, require_range
from vitrail.runtime.hardware import choose_device, describe_environment

PROG = "python benchmarks/bench.py"
PEERS_VARIABLE = "VITRAIL_PEERS"
PLOT = Path("growth.png")
GROWTH_ROUNDS = 3

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class PresetOption:
    """The preset to measure."""

    preset: str = "reference"
    """Base configuration; the model, augmentation and training flags override it."""


@dataclass(frozen=True)
class MeasureOptions(PresetOption):
    """What is measured, and which other systems."""

    quick: Flag = False
    """Fewer steps and rounds, for a quick look."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto selects cuda, then mps, then cpu."""
    workloads: tuple[Workload, ...] = tuple(TITLES)
    """Workloads, each a section of the table."""
    rounds: int | None = None
    """Measured rounds, after a warm-up round. Default: 5; 3 with --quick or --growth."""
    peers: Path | None = None
    """Virtual environment of the other systems (benchmarks/peers.sh), or its interpreter. Default:
    the environment variable VITRAIL_PEERS."""
    reference_path: Path | None = None
    """A clone of the reference implementation. Default: PEERS/reference."""
    data_path: Path = Path("data")
    """Folder of CIFAR-10, which the reference loads itself."""
    growth: Flag = False
    """Plot how time and memory grow with images, tokens, layers and batch size instead."""
    plot: Path | None = None
    """With --growth: file of the plot. Default: growth.png."""

    def __post_init__(self) -> None:
        require_range(self, "rounds", 1)
        require(bool(self.workloads), "workloads is empty: name at least one")
        if not self.growth:
            require(self.plot is None, "plot requires growth: add --growth or remove --plot")
            return
        for name in ("workloads", "peers", "reference_path", "data_path"):
            unchanged = getattr(self, name) == type(self).__dataclass_fields__[name].default
            require(
                unchanged, f"{name} cannot be combined with growth, which measures only Vitrail"
            )


@dataclass(frozen=True)
class BenchOptions(Recipe, MeasureOptions):
    """Measure speed and memory of training, testing and explaining; alone or next to others.

    Prints a table, then one line of JSON. The other systems are plain ViTs of the same width,
    depth, heads, patches and batch size, each in a process of their own environment.
    """

    @property
    def recipe(self) -> Recipe:
        """The measured settings."""
        return Recipe(self.model, self.augment, self.training)


def command(words: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    process.limit_spinning()
    start, _ = parse_known(PresetOption, words, prog=PROG, add_help=False)
    recipe = Recipe.of(get_preset(start.preset))
    defaults = BenchOptions(preset=start.preset, **vars(recipe))
    options = parse(BenchOptions, words, prog=PROG, default=defaults)
    try:
        grow(options) if options.growth else measure(options)
    except KeyboardInterrupt:
        print_err("stopped")
        return 130
    return 0


def measure(options: BenchOptions) -> None:
    """Compare systems; print the table and the JSON line."""
    device = choose_device(options.device).type
    amounts = QUICK if options.quick else Amounts()
    environment = options.peers or os.environ.get(PEERS_VARIABLE)
    reference_path = options.reference_path
    if environment and reference_path is None and (Path(environment) / REFERENCE).is_dir():
        reference_path = Path(environment) / REFERENCE
    bench = Bench(
        options.recipe,
        device=device,
        workloads=tuple(dict.fromkeys(options.workloads)),
        amounts=replace(amounts, rounds=options.rounds or amounts.rounds),
        python=python_of(Path(environment)) if environment else None,
        reference_path=reference_path,
        data_path=options.data_path,
    )
    found = compare(bench, print_err)
    machine = describe(device)
    out.print(comparison_table(found, title(options, device, machine)))
    for line in below(found, sizes(found)):
        out.print(line, markup=False)
    print(json.dumps(comparison_json(found, preset=options.preset, machine=machine)))


def grow(options: BenchOptions) -> None:
    """Measure growth; save the plot, print the table and the JSON line."""
    device, plot = choose_device(options.device).type, options.plot or PLOT
    rounds = options.rounds or GROWTH_ROUNDS
    points = measure_growth(
        options.recipe, device=device, rounds=rounds, quick=options.quick, say=print_err
    )
    plot_growth(points, plot)
    machine = describe(device)
    out.print(growth_table(points, title(options, device, machine)))
    print_err(f"plot saved to {plot}")
    about = {"preset": options.preset, "device": device, "machine": machine}
    print(json.dumps(growth_json(points, **about)))


def describe(device: str) -> dict[str, Any]:
    """Return the versions and the machine, on which the numbers depend."""
    about = describe_environment(torch.device(device), "")
    return {name: about[name] for name in ("versions", "system", "processor", "threads", "device")}


def title(options: BenchOptions, device: str, machine: dict[str, Any]) -> str:
    """Return a line about what was measured."""
    model, batch = options.model, options.training.batch_size
    where = machine["device"] if device == "cuda" else f"{device}, {machine['threads']} threads"
    return (
        f"{options.preset}: {model.n_layers} layers x {model.embed_dim}, "
        f"{model.n_attention_heads} heads, patch {model.patch_size} of {model.image_hw[0]} px, "
        f"batch {batch}; {where}"
    )


if __name__ == "__main__":
    sys.exit(guarded(command, sys.argv[1:]))
