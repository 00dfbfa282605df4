"""The table of a folder's classes, pictures and splits."""

from rich.table import Table
from rich.text import Text

from vitrail.cli.console import err, say
from vitrail.data.manifest import SPLITS, Manifest, class_counts, summary
from vitrail.errors import printable

SHOWN = 20
"""Classes that get a row of their own."""


def show_manifest(manifest: Manifest) -> None:
    """Print how many pictures each class has in each split, and what is left out."""
    counts = class_counts(manifest)
    totals = [sum(column) for column in zip(*(row for _, row in counts), strict=True)]
    say(f"{manifest.root}: {len(counts)} classes, {sum(totals):,} pictures")
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("class", overflow="fold")
    for split in SPLITS:
        table.add_column(split, justify="right")
    shown = counts if len(counts) <= SHOWN else counts[: SHOWN - 1]
    for name, row in shown:
        table.add_row(Text(printable(name)), *(f"{count:,}" for count in row))
    if len(shown) < len(counts):
        rest = [sum(column) for column in zip(*(r for _, r in counts[len(shown) :]), strict=True)]
        table.add_row(f"{len(counts) - len(shown)} more", *(f"{count:,}" for count in rest))
    table.add_section()
    table.add_row("total", *(f"{count:,}" for count in totals))
    err.print(table)
    if line := summary(manifest):
        say(line)
    if not totals[SPLITS.index("test")]:
        say("There is no test split: the run will have no test score.")
