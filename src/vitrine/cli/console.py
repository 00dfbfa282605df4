"""Where words go: results to standard output, everything else to standard error."""

from rich.console import Console

out = Console(highlight=False)
err = Console(highlight=False, stderr=True)


def say(message: str) -> None:
    """Tell the user something that is not the result."""
    err.print(message, markup=False, soft_wrap=True)
