"""A comparison as one table, and as one JSON object."""

from typing import Any

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from speed.compare import Comparison, Row, gigaflops
from speed.jobs import OURS, REFERENCE, TITLES
from vitrail.config.files import to_json

COLUMNS = ("", "images/s", "spread", "ratio", "product", "peak", "MiB")
NO_PEERS = (
    "Only Vitrail was measured. To compare: bash benchmarks/peers.sh peers, then --peers peers"
)
EXPLAINED = (
    "images/s: median of the rounds; spread: half the range; ratio: to the section's first row; "
    "product: fraction of the speed of the model's widest matrix product ({own}); peak: of the "
    "fastest matrix product, in the same precision; MiB: peak memory of the {memory}."
)


def comparison_table(found: Comparison, title: str) -> Table:
    """Return the table: a section per workload, with the reference, if measured, first."""
    table = Table(title=Text(title), title_justify="left", box=HORIZONTALS, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for workload in found.bench.workloads:
        rows = [row for row in found.rows if row.job.workload == workload]
        rows.sort(key=lambda row: (row.job.system != REFERENCE, row.job.system == OURS))
        table.add_row(Text(TITLES[workload].upper()))
        for row in rows:
            name = f"{row.job.system}, {row.job.precision}"
            style = "bold" if row.job.system == OURS else ""
            table.add_row(Text(name, style=style), *cells(row, rows[0].rate))
        table.add_section()
    return table


def cells(row: Row, first: float) -> list[str]:
    """Return the numbers of a row as text."""
    shares = ["-" if share is None else f"{share:.0%}" for share in (row.of_product, row.of_peak)]
    spread = f"±{(max(row.rates) - min(row.rates)) / 2 / row.rate:.0%}"
    return [f"{row.rate:,.0f}", spread, f"{row.rate / first:.2f}", *shares, f"{row.peak_mib:,.0f}"]


def below(found: Comparison, sizes: dict[str, tuple[int, int, int]]) -> list[str]:
    """Return the lines below the table: column meanings, matrix products, and what was skipped."""
    names = {name: " x ".join(map(str, size)) for name, size in sizes.items()}
    memory = "GPU" if found.bench.device == "cuda" else "process"
    lines = [EXPLAINED.format(own=names["own"], memory=memory)]
    for precision, table in found.products.items():
        speeds = (f"{gigaflops(max(table[name]))} at {names[name]}" for name in names)
        lines.append(f"Matrix products in {precision}, GFLOP/s (best round): {', '.join(speeds)}.")
    if found.bench.python is None:
        lines.append(NO_PEERS)
    return lines + found.remarks


def best_ratios(found: Comparison) -> dict[str, dict[str, float]]:
    """Return the ratio of our best rate to the best of each other system, per workload."""
    ratios: dict[str, dict[str, float]] = {}
    for workload in found.bench.workloads:
        best: dict[str, float] = {}
        for row in found.rows:
            if row.job.workload == workload:
                system = row.job.system
                best[system] = max(best.get(system, 0.0), row.rate)
        ours = best.pop(OURS)
        ratios[workload] = {system: ours / rate for system, rate in best.items()}
    return ratios


def comparison_json(found: Comparison, **about: Any) -> dict[str, Any]:
    """Return all results as JSON values."""
    return {
        "title": "benchmarks/bench.py",
        **about,
        "device": found.bench.device,
        "config": {
            section: values
            for section, values in to_json(found.bench.recipe.config()).items()
            if section in ("model", "augment", "training")
        },
        "ours_over_best_of": best_ratios(found),
        "operations_per_image": found.operations,
        "products_per_second": found.products,
        "rows": [row.to_json() for row in found.rows],
        "remarks": found.remarks,
    }
