"""Where words go: results to standard output, everything else to standard error."""

from typing import Any

from rich.console import Console

from vitrail.errors import printable

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)


def say(message: str) -> None:
    """Tell the user something that is not the result."""
    err.print(clean(message), markup=False, soft_wrap=True)


def tell(message: str, **style: Any) -> None:
    """Print a part of the result in words."""
    out.print(clean(message), markup=False, soft_wrap=True, **style)


def clean(message: str) -> str:
    """Return lines that command no terminal: file and class names may hold anything."""
    return "\n".join(map(printable, message.split("\n")))
