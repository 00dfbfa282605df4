"""Words in, exit codes out. Heavy imports wait inside the commands; no science here.

Exit codes: 0 done; 1 done in part, or training could not go on; 2 refused, with one line that says
why; 128 + n stopped by signal n.
"""

import importlib
import sys
import time
from collections.abc import Callable, Sequence

from vitrine.allocator import keep_freed_memory
from vitrine.errors import ConfigError, TrainingError, VitrineError, nearest

STARTED = time.perf_counter()
"""When the program began, or nearly so."""

COMMANDS = {
    "train": "train a Vision Transformer, or go on with a run",
    "test": "score a model on a data set",
    "predict": "classify pictures",
    "explain": "show what a model looked at in a picture",
    "inspect": "show a model's filters, positions and heads",
    "convert": "bring weights in from other systems, and out to them",
    "push": "put a model on the Hugging Face hub",
    "export": "write a model as ONNX or as a torch program",
    "sweep": "search for good settings",
    "bench": "measure speed and memory, alone or beside other systems",
    "info": "show presets, runs, this machine, or one model",
}

USAGE = """\
Vitrine: train a Vision Transformer on small images, test it, and see through it.

usage: vitrine COMMAND [OPTIONS]       (vitrine COMMAND --help for its options)

{commands}

Start here:
  vitrine train --preset quick         two minutes on a laptop, no data needed
  vitrine predict cat.png              with the newest model
  vitrine explain cat.png              what it looked at, as an animation
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        lines = (f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
        print(USAGE.format(commands="\n".join(lines)), end="")
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"vitrine {version('vitrine')}")
        return 0
    return guarded(lambda: run(words[0], words[1:]))


def run(command: str, words: Sequence[str]) -> int:
    """Run one command; its exceptions are the caller's."""
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise ConfigError(f"unknown command {command!r}{nearest(command, COMMANDS)}: {known}")
    if command != "train":
        importlib.import_module("vitrine.cli.processes").refuse_many(command)
    return int(importlib.import_module(f"vitrine.cli.{command}").command(words))


def exit_code(error: VitrineError) -> int:
    """Return how a process ends with one of our own exceptions."""
    return 1 if isinstance(error, TrainingError) else 2


def guarded(command: Callable[[], int]) -> int:
    """Run a command; turn our own exceptions into one line and an exit code."""
    keep_freed_memory()
    try:
        return command()
    except VitrineError as error:
        print(f"vitrine: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:  # outside of training, where there is nothing to save
        print("vitrine: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `vitrine info | head`
        sys.stdout = None
        return 1
