"""``vitrail bench``."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vitrail.bench.jobs import QUICK, REFERENCE, TITLES, Amounts, Recipe, Workload
from vitrail.cli.console import out, say
from vitrail.cli.parsing import parse, parse_known
from vitrail.config.presets import get_preset
from vitrail.config.settings import require, require_range

PROG = "vitrail bench"
PEERS_VARIABLE = "VITRAIL_PEERS"
PLOT = Path("growth.png")
GROWTH_ROUNDS = 3

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class PresetOption:
    """Whose settings are measured."""

    preset: str = "reference"
    """A whole configuration by name; the flags of model, augmentation and training go over it."""


@dataclass(frozen=True)
class MeasureOptions(PresetOption):
    """What is measured, and beside whom."""

    quick: Flag = False
    """Fewer steps and rounds, for a first look."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, then mps, then cpu."""
    workloads: tuple[Workload, ...] = tuple(TITLES)
    """Kinds of work, each a section of the table."""
    rounds: int | None = None
    """Rounds that count, after one that does not: 5 unless given, with --quick or --growth 3."""
    peers: Path | None = None
    """Virtual environment of the other systems (benchmarks/peers.sh), or its interpreter; the
    environment variable VITRAIL_PEERS unless given."""
    reference_path: Path | None = None
    """A clone of the reference system; PEERS/reference unless given."""
    data_path: Path = Path("data")
    """Where CIFAR-10 is, which the reference loads itself."""
    growth: Flag = False
    """Instead, how cost grows with images, tokens, layers and batch: a plot."""
    plot: Path | None = None
    """With --growth, where the plot goes: growth.png unless given."""

    def __post_init__(self) -> None:
        require_range(self, "rounds", 1)
        require(bool(self.workloads), "workloads is empty: give at least one")
        if not self.growth:
            require(self.plot is None, "plot goes with growth: give --growth too, or leave it out")
            return
        for name in ("workloads", "peers", "reference_path", "data_path"):
            unchanged = getattr(self, name) == type(self).__dataclass_fields__[name].default
            require(unchanged, f"{name} does not go with growth, which measures Vitrail alone")


@dataclass(frozen=True)
class BenchOptions(Recipe, MeasureOptions):
    """Measure speed and memory: training, testing, explaining; alone or beside other systems.

    One table, and one line of JSON at the end. The other systems are plain ViTs of the same width,
    depth, heads, patches and batch, each in a process of its own environment.
    """

    @property
    def recipe(self) -> Recipe:
        """The settings that are measured."""
        return Recipe(self.model, self.augment, self.training)


def command(words: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail bench``."""
    start, _ = parse_known(PresetOption, words, prog=prog, add_help=False)
    recipe = Recipe.of(get_preset(start.preset))
    defaults = BenchOptions(preset=start.preset, **vars(recipe))
    options = parse(BenchOptions, words, prog=prog, default=defaults)
    try:
        grow(options) if options.growth else measure(options)
    except KeyboardInterrupt:
        say("stopped")
        return 130
    return 0


def measure(options: BenchOptions) -> None:
    """Compare, print the table and the JSON line."""
    from vitrail.bench.compare import Bench, compare, sizes
    from vitrail.bench.report import below, comparison_json, comparison_table
    from vitrail.bench.workers import python_of
    from vitrail.runtime.devices import choose_device

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
    found = compare(bench, say)
    machine = describe(device)
    out.print(comparison_table(found, title(options, device, machine)))
    for line in below(found, sizes(found)):
        out.print(line, markup=False)
    print(json.dumps(comparison_json(found, preset=options.preset, machine=machine)))


def grow(options: BenchOptions) -> None:
    """Measure growth, draw it, print the table and the JSON line."""
    from vitrail.bench.growth import growth_json, growth_table, measure_growth, plot_growth
    from vitrail.runtime.devices import choose_device

    device, plot = choose_device(options.device).type, options.plot or PLOT
    rounds = options.rounds or GROWTH_ROUNDS
    points = measure_growth(
        options.recipe, device=device, rounds=rounds, quick=options.quick, say=say
    )
    plot_growth(points, plot)
    machine = describe(device)
    out.print(growth_table(points, title(options, device, machine)))
    say(f"drawn in {plot}")
    about = {"preset": options.preset, "device": device, "machine": machine}
    print(json.dumps(growth_json(points, **about)))


def describe(device: str) -> dict[str, Any]:
    """Return what the numbers depend on: versions and machine."""
    import torch

    from vitrail.runtime.environment import describe_environment

    about = describe_environment(torch.device(device), "")
    return {name: about[name] for name in ("versions", "system", "processor", "threads", "device")}


def title(options: BenchOptions, device: str, machine: dict[str, Any]) -> str:
    """Return what was measured, in a line."""
    model, batch = options.model, options.training.batch_size
    where = machine["device"] if device == "cuda" else f"{device}, {machine['threads']} threads"
    return (
        f"{options.preset}: {model.n_layers} layers x {model.embed_dim}, "
        f"{model.n_attention_heads} heads, patch {model.patch_size} of {model.image_hw[0]} px, "
        f"batch {batch}; {where}"
    )
