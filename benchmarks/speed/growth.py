"""How time and memory grow with images, tokens, layers and batch size."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from speed.compare import fail
from speed.jobs import OURS, Job, Recipe
from speed.workers import command, interleave, started

PATCHES = (8, 4, 2)
LAYERS = (3, 6, 12)
BATCHES = (32, 64, 128, 256)
IMAGES = (500, 1_000, 2_000, 4_000)
SERIES = {
    "step": "training step",
    "inference": "inference",
    "attention": "inference with attention",
}
IMAGES_SERIES = {"predict": "logits of a dataset"}
AXES = {
    "images": "images",
    "tokens": "patches per image",
    "layers": "layers",
    "batch": "batch size",
}


@dataclass(frozen=True)
class Point:
    """One measurement: time and memory of one call at one value of an axis."""

    axis: str
    value: int
    series: str
    seconds: float
    """Median of the rounds, per batch or per dataset."""
    work_mib: float
    """Peak memory minus the memory before anything was built."""


def axis_points(recipe: Recipe, axis: str, *, quick: bool) -> list[tuple[int, Recipe, int]]:
    """Return the values of an axis, each with its recipe and the number of images."""
    model, batch = recipe.config().model, recipe.training.batch_size
    most = 3 if quick else None
    if axis == "images":
        return [(count, recipe, count) for count in IMAGES[:most]]
    if axis == "layers":
        return [(n, recipe.changed(n_layers=n), batch) for n in LAYERS]
    if axis == "batch":
        return [(n, recipe.changed(batch_size=n), n) for n in BATCHES[:most]]
    height, width = model.image_hw
    fitting = [patch for patch in PATCHES if height % patch == 0 and width % patch == 0]
    return [
        ((height // patch) * (width // patch), recipe.changed(patch_size=patch), batch)
        for patch in fitting
    ]


def measure_growth(
    recipe: Recipe,
    *,
    device: str,
    rounds: int,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Measure every axis: the values of a series in turn, each in its own process.

    Raises:
        ConfigError: the settings cannot be measured.
        BenchError: a point could not be measured.
    """
    points = []
    for axis, title in AXES.items():
        say(f"growth with {title}")
        for series in IMAGES_SERIES if axis == "images" else SERIES:
            values = axis_points(recipe, axis, quick=quick)
            points += measure_series(axis, series, values, device=device, rounds=rounds)
    return points


def measure_series(
    axis: str,
    series: str,
    values: Iterable[tuple[int, Recipe, int]],
    *,
    device: str,
    rounds: int,
) -> list[Point]:
    """Measure one series of an axis."""
    precision, commands, counts = "float32", {}, {}
    for value, recipe, images in values:
        job = Job(f"{OURS} {value}", precision, series)
        commands[job] = command(job.spec(recipe, device=device, images=images))
        counts[job] = (value, images)
    with started(commands, give_up=fail) as workers:

        def contestant(job: Job) -> Callable[[], float]:
            request = counts[job][1] if series in IMAGES_SERIES else 1
            return lambda: workers[job].rate(request)

        rates = interleave({job: contestant(job) for job in workers}, rounds=rounds)
        return [
            Point(
                axis,
                counts[job][0],
                series,
                seconds=counts[job][1] / median(rates[job]),
                work_mib=worker.peak_mib - worker.about["rest_mib"],
            )
            for job, worker in workers.items()
        ]


def exponent(points: list[Point], quantity: str) -> float:
    """Return the exponent of the power law that best fits a series (1 is linear).

    Least squares on logarithms.
    """
    xs = [math.log(point.value) for point in points]
    ys = [math.log(max(getattr(point, quantity), 1e-9)) for point in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def by_series(points: list[Point]) -> dict[tuple[str, str], list[Point]]:
    """Group the points by axis and series."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.axis, point.series), []).append(point)
    return groups


def growth_table(points: list[Point], title: str) -> Table:
    """Return one row per axis and series: time and memory at its values, and the power law."""
    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for column in ("with", "", "seconds", "grows as", "MiB"):
        table.add_column(column)
    for (axis, series), some in by_series(points).items():
        values = ", ".join(f"{point.value:,}" for point in some)
        seconds = ", ".join(f"{point.seconds:.3g}" for point in some)
        memory = ", ".join(f"{point.work_mib:,.0f}" for point in some)
        power = f"{axis}^{exponent(some, 'seconds'):.2f}" if len(some) > 1 else "-"
        title_of = (SERIES | IMAGES_SERIES)[series]
        table.add_row(f"{axis} {values}", title_of, seconds, power, memory)
    return table


def growth_json(points: list[Point], **about: Any) -> dict[str, Any]:
    """Return all results as JSON values."""
    return {
        "title": "benchmarks/bench.py --growth",
        **about,
        "exponents": {
            f"{axis}, {series}": exponent(some, "seconds")
            for (axis, series), some in by_series(points).items()
            if len(some) > 1
        },
        "points": [asdict(point) for point in points],
    }


def plot_growth(points: list[Point], path: Path) -> None:
    """Plot time (top) and memory (bottom), a column per axis, on logarithmic scales.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from vitrail.evaluation.report import BLUE, GREEN, ORANGE, save_figure, tidy, write_title

    colors = {"step": BLUE, "inference": GREEN, "attention": ORANGE, "predict": GREEN}
    titles = SERIES | IMAGES_SERIES
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharex="col")
    for (axis, series), some in by_series(points).items():
        column = list(AXES).index(axis)
        values = [point.value for point in some]
        rows = (("seconds", titles[series]), ("work_mib", None))
        for axes, (quantity, label) in zip(grid[:, column], rows, strict=True):
            heights = [getattr(point, quantity) for point in some]
            axes.plot(values, heights, "o-", color=colors[series], label=label)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    for axes in grid.flat:  # a nearly flat line should look flat and have a tick label
        low, high = axes.get_ylim()
        axes.set_ylim(low / 2, high * 2)
    for column, (axis, title) in enumerate(AXES.items()):
        upper, lower = grid[:, column]
        write_title(upper, f"With {axis}")
        upper.set_ylabel("seconds per dataset" if axis == "images" else "seconds per batch")
        lower.set(xlabel=title, ylabel="memory, MiB")
        for axes in (upper, lower):
            tidy(axes)
        upper.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
