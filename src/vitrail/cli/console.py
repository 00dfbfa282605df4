"""Where output goes: results to standard output, everything else to standard error."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table

from vitrail.errors import printable

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)


def print_err(message: str) -> None:
    """Print a message that is not part of the result."""
    err.print(clean(message), markup=False, soft_wrap=True)


def print_out(message: str, **style: Any) -> None:
    """Print part of the result as text."""
    out.print(clean(message), markup=False, soft_wrap=True, **style)


def clean(message: str) -> str:
    """Return lines without control characters: file and class names may contain any."""
    return "\n".join(map(printable, message.split("\n")))


def number_table(first: str, *columns: str) -> Table:
    """Return an empty table with a column of names, and columns of numbers."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def waiting(what: str) -> AbstractContextManager[object]:
    """Show on a terminal, while the block runs, that the program is busy with something."""
    return err.status(f"{what} …") if err.is_terminal else nullcontext()


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal while the block runs; yield a function that advances it."""
    from rich.progress import Progress  # here, since --help need not load it

    with Progress(console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number: progress.advance(task, number)
