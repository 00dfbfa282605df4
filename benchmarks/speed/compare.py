"""Vitrail compared with other systems: same shape, batch and machine, measured in turn."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from speed.jobs import (
    OURS,
    PEERS_FOR,
    REFERENCE,
    TITLES,
    TRAINS,
    Amounts,
    Job,
    Recipe,
    Workload,
    jobs_of,
    why_unsupported,
)
from speed.workers import BenchError, Worker, command, interleave, started

FORMATS = ("float32", "bfloat16")
SQUARE = {"cpu": 2048, "mps": 4096, "cuda": 8192}
"""Size of the square matrix product whose speed counts as the machine's peak."""
CIFAR = "cifar-10-batches-py"
PROBABILITY_TOLERANCE = 1e-3
"""Largest difference in any probability between two systems with the same weights."""


@dataclass(frozen=True)
class Bench:
    """What to compare, and where."""

    recipe: Recipe
    device: str = "cpu"
    workloads: tuple[Workload, ...] = tuple(TITLES)
    amounts: Amounts = field(default_factory=Amounts)
    python: Path | None = None
    """Interpreter of the peers' environment; None to measure only Vitrail."""
    reference_path: Path | None = None
    """A clone of the reference implementation."""
    data_path: Path = Path("data")
    """Folder of CIFAR-10, which the reference loads itself."""


@dataclass(frozen=True)
class Row:
    """The result of one job."""

    job: Job
    rates: tuple[float, ...]
    """Images per second, one per round."""
    peak_mib: float
    """Peak memory: of the GPU on CUDA, else of the whole process."""
    rest_mib: float
    """Memory before anything was built."""
    of_product: float | None = None
    """Fraction of the speed of the model's widest matrix product in the same precision."""
    of_peak: float | None = None
    """Fraction of the fastest matrix product in the same precision."""
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Median of the rates."""
        return median(self.rates)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, those of the job first."""
        values = {**dataclasses.asdict(self.job), "images_per_second": self.rate}
        rest = dataclasses.asdict(self)
        del rest["job"]
        return values | rest


@dataclass
class Comparison:
    """All rows, the speed of matrix products, and what was skipped and why."""

    bench: Bench
    rows: list[Row] = field(default_factory=list)
    products: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Operations per second by precision and size, one per round."""
    operations: dict[str, list[float]] = field(default_factory=dict)
    """Operations per image, inference and training: of our model and of the plain ViT."""
    remarks: list[str] = field(default_factory=list)

    def note(self, remark: str) -> None:
        """Add a remark unless it is already there."""
        if remark not in self.remarks:
            self.remarks.append(remark)


def compare(bench: Bench, say: Callable[[str], None] = lambda _: None) -> Comparison:
    """Measure every workload, all systems in turn, round by round.

    Raises:
        ConfigError: the settings cannot be measured.
        BenchError: Vitrail's own work could not be measured.
    """
    found = Comparison(bench)
    job = Job("torch", "float32", "product")
    words = command(job.spec(bench.recipe, device=bench.device))
    with started({job: words}, give_up=fail) as products:
        worker = products[job]
        found.operations = worker.about["operations"]
        precisions = choose_precisions(worker, found)
        for workload in bench.workloads:
            say(f"{workload}: {TITLES[workload]}")
            measure_workload(workload, precisions, worker, found)
    return found


def choose_precisions(products: Worker, found: Comparison) -> tuple[str, ...]:
    """Return the precisions to measure: the requested one, or float32 and bfloat16 if faster."""
    asked = found.bench.recipe.training.precision
    if asked != "auto":
        return (asked,)
    speed = {}
    for name in FORMATS:
        product = {"precision": name, "size": own_size(found)}
        products.rate(product)  # the first one includes preparation
        speed[name] = products.rate(product)
    if speed["bfloat16"] > speed["float32"]:
        return FORMATS
    found.note(
        f"bfloat16 was skipped: its matrix products run at {gigaflops(speed['bfloat16'])} GFLOP/s "
        f"here, float32 at {gigaflops(speed['float32'])} (--precision bfloat16 measures it anyway)"
    )
    return ("float32",)


def gigaflops(rate: float) -> str:
    """Return GFLOP/s with at least two digits."""
    return f"{rate / 1e9:,.0f}" if rate > 1e10 else f"{rate / 1e9:.2g}"


def own_size(found: Comparison) -> tuple[int, int, int]:
    """Return the sizes of the model's widest matrix product: tokens to q, k and v."""
    config = found.bench.recipe.config()
    rows, columns = config.model.grid_GJ
    tokens = rows * columns + config.model.n_prefix_tokens
    width = config.model.embed_dim
    return config.training.batch_size * tokens, width, 3 * width


def sizes(found: Comparison) -> dict[str, tuple[int, int, int]]:
    """Return the matrix products to measure: the model's widest and a large square one."""
    side = SQUARE[found.bench.device]
    return {"own": own_size(found), "square": (side, side, side)}


def choose_peers(workload: Workload, found: Comparison) -> dict[str, str | None]:
    """Return the peers for a workload, each with the reason to skip it, or None."""
    bench, chosen = found.bench, {}
    if bench.python is None:
        return {}
    for system in PEERS_FOR[workload]:
        why_not = why_unsupported(system, workload, bench.recipe.model)
        if system == REFERENCE and bench.reference_path is None:
            why_not = "its code was not found: give a clone as --reference_path"
        elif workload in ("epoch", "test") and not (bench.data_path / CIFAR).is_dir():
            why_not = (
                f"CIFAR-10, which it loads itself, is not in {bench.data_path}: give --data_path"
            )
        chosen[system] = why_not
        if why_not is not None:
            found.note(f"{system} was skipped in {workload}: {why_not}")
    return chosen


def measure_workload(
    workload: Workload, precisions: tuple[str, ...], products: Worker, found: Comparison
) -> None:
    """Start one process per job, measure them in turn, and add the rows."""
    bench = found.bench
    jobs = jobs_of(workload, precisions, choose_peers(workload, found))

    def give_up(job: Job, error: BenchError) -> None:
        if job.system == OURS:
            fail(job, error)
        found.note(f"{job.system} ({job.precision}) was skipped in {job.workload}: {error}")

    with tempfile.TemporaryDirectory() as folder:
        more = {
            "device": bench.device, "data_path": bench.data_path, "folder": folder,
            "reference_path": bench.reference_path, "images": bench.amounts.test_images,
        }  # fmt: skip
        theirs = [job for job in jobs if job.system != OURS]
        ours = [job for job in jobs if job.system == OURS]
        with (  # peers first: ours reads what the reference saves
            started(commands(theirs, bench, more), give_up) as peers,
            started(commands(ours, bench, more), give_up) as own,
        ):
            measure_rounds({**peers, **own}, products, found, give_up)


def commands(jobs: Iterable[Job], bench: Bench, more: Mapping[str, Any]) -> dict[Job, list[str]]:
    """Return the command line of each job."""
    return {
        job: command(job.spec(bench.recipe, **more), None if job.system == OURS else bench.python)
        for job in jobs
    }


def measure_rounds(
    workers: dict[Job, Worker],
    products: Worker,
    found: Comparison,
    give_up: Callable[[Job, BenchError], None],
) -> None:
    """Measure the jobs and the matrix products in turn and add the rows."""
    workload = next(iter(workers)).workload
    request = found.bench.amounts.request(workload)  # type: ignore[arg-type]

    def contestant(job: Job, worker: Worker) -> Callable[[], float]:
        def measure() -> float:
            try:
                return worker.rate(request)
            except BenchError as error:
                give_up(job, error)
                return math.nan

        return measure

    def product(precision: str, name: str) -> Callable[[], float]:
        asked = {"precision": precision, "size": sizes(found)[name]}
        return lambda: products.rate(asked)

    formats = dict.fromkeys(job.precision for job in workers)
    keys = {(f, name): product(f, name) for f in formats for name in sizes(found)}
    contestants: dict[Any, Callable[[], float]] = {
        **{job: contestant(job, worker) for job, worker in workers.items()}, **keys
    }  # fmt: skip
    rates = interleave(contestants, rounds=found.bench.amounts.rounds)
    for precision, name in keys:
        table = found.products.setdefault(precision, {})
        table.setdefault(name, []).extend(rates[precision, name])
    for job, worker in workers.items():
        if not math.isnan(sum(rates[job])):
            speed = {name: median(rates[job.precision, name]) for name in sizes(found)}
            found.rows.append(make_row(job, worker, rates[job], speed, found))


def make_row(
    job: Job, worker: Worker, rates: list[float], speed: dict[str, float], found: Comparison
) -> Row:
    """Return the row of a job; note how far its probabilities are from the reference's."""
    own, peak = None, None
    if job.workload != "explanation":
        kind = (
            "ours" if job.system == OURS and "largest_difference" not in worker.about else "plain"
        )
        operations = found.operations[kind][job.workload in TRAINS] * median(rates)
        own, peak = operations / speed["own"], operations / max(speed.values())
    about = dict(worker.about)
    rest_mib = about.pop("rest_mib")
    difference = about.get("largest_difference")
    if difference is not None:
        verdict = "equal" if difference <= PROBABILITY_TOLERANCE else "NOT EQUAL"
        found.note(
            f"test, {job.precision}: with the reference's weights the largest difference in "
            f"probability is {difference:.1e} ({verdict} within {PROBABILITY_TOLERANCE:g}), the "
            f"mean confidence is {about['mean_confidence']:.2f}"
        )
    return Row(job, tuple(rates), worker.peak_mib, rest_mib, own, peak, about)


def fail(job: Job, error: BenchError) -> None:
    """Raise the error that prevented our own measurement."""
    raise BenchError(f"{job.workload} ({job.precision}) cannot be measured: {error}") from error
