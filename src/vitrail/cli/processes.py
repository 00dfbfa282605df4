"""Output and exit codes under torchrun: only the first of the processes prints."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vitrail.cli import console, exit_code
from vitrail.errors import ConfigError, VitrailError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that torchrun sets."""
Caller = Callable[..., Any]
"""A function that calls another one with the arguments that follow."""


@contextmanager
def one_run() -> Iterator[Caller]:
    """Join the processes that torchrun started, if it did; all but the first stop printing.

    Yields the function that calls another one on the first process only and returns its result on
    all. An error occurs on every process: the first one reports it, the others only exit.
    """
    if not all(os.environ.get(name) for name in NEEDED):
        yield call
        return
    from vitrail.runtime import distributed

    with distributed.joined():
        leader = distributed.is_leader()
        quiet = console.out.quiet, console.err.quiet
        console.out.quiet = console.err.quiet = not leader
        try:
            yield distributed.on_leader
        except VitrailError as error:
            if leader:
                raise
            sys.exit(exit_code(error))
        finally:
            console.out.quiet, console.err.quiet = quiet


def call(function: Callable[..., Any], *words: Any) -> Any:
    """Call a function: the counterpart of ``distributed.on_leader`` for a single process."""
    return function(*words)


def refuse_many(command: str) -> None:
    """Refuse a command that several processes would only repeat.

    Raises:
        ConfigError: torchrun started more than one.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        if os.environ.get("RANK") != "0":
            sys.exit(2)
        raise ConfigError(f"vitrail {command} runs in one process: start it without torchrun")
