"""Words in, exit codes out. Heavy imports wait inside the commands; no science here.

Exit codes:
    0        done
    1        done in part, or the command could not go on: a loss that is not finite, no memory, a
             full disk, a library that cannot be imported
    2        refused: a mistake in the command, its settings, data or weights
    70       an error in Vitrail itself; the traceback is in the file that the message names
    128 + n  stopped by signal n
"""

import importlib
import io
import sys
import time
from collections.abc import Callable, Sequence

from vitrail.errors import ConfigError, TrainingError, VitrailError, nearest
from vitrail.runtime import waiting
from vitrail.runtime.allocator import keep_freed_memory

STARTED = time.perf_counter()
"""When the program began, or nearly so."""
LOAD = waiting.read_processor()
"""How busy the processor had been until then."""

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
    "info": "show presets, runs, this machine, or one model",
}

USAGE = """\
Vitrail: train a Vision Transformer on small images, test it, and see through it.

usage: vitrail COMMAND [OPTIONS]       (vitrail COMMAND --help for its options)

{commands}

Start here:
  vitrail train --preset quick         two minutes on a laptop, no data needed
  vitrail predict cat.png              with the newest model
  vitrail explain cat.png              what it looked at, as an animation

--debug with any command prints the traceback of an error. Exit codes: 0 done; 1 done in part, or
it could not go on (memory, disk, a loss that is not finite); 2 refused; 70 an error in Vitrail
itself; 128 + n stopped by signal n.
"""

DEBUG = "--debug"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    return guarded(dispatch, sys.argv[1:] if argv is None else argv)


def dispatch(words: Sequence[str]) -> int:
    """Answer --help and --version, or run a command."""
    if not words or words[0] in ("-h", "--help"):
        lines = (f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
        print(USAGE.format(commands="\n".join(lines)), end="")
        return 0 if words else 2
    if words[0] == "--version":
        import vitrail

        print(f"vitrail {vitrail.__version__}")
        return 0
    return run(words[0], words[1:])


def run(command: str, words: Sequence[str]) -> int:
    """Run one command; its exceptions are the caller's."""
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise ConfigError(f"unknown command {command!r}{nearest(command, COMMANDS)}: {known}")
    if command != "train":
        importlib.import_module("vitrail.cli.processes").refuse_many(command)
    module = importlib.import_module(f"vitrail.cli.{command}")
    waiting.choose_waiting(LOAD)
    return int(module.command(words))


def exit_code(error: VitrailError) -> int:
    """Return how a process ends with one of our own exceptions."""
    return 1 if isinstance(error, TrainingError) else 2


def guarded(command: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """Run a command; turn every exception into one line on standard error and an exit code.

    ``--debug`` among the words prints the traceback instead.
    """
    keep_freed_memory()
    accept_any_character()
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    try:
        code = command(words)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, so that a full disk behind a pipe is reported, too
    except KeyboardInterrupt:  # outside of training, where there is nothing to save
        print("vitrail: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `vitrail info | head`
        sys.stdout = None
        return 1
    except Exception as error:  # noqa: BLE001 (the edge of the program)
        return conclude(error, words, debug=debug)
    return code


def conclude(error: Exception, words: Sequence[str], *, debug: bool) -> int:
    """Report an exception on standard error and return the exit code."""
    from vitrail.cli import failures

    if isinstance(error, OSError) and error.filename is None:
        sys.stdout = None  # it may be what failed; Python would flush it again at its end
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, VitrailError):
        if not debug:
            print(f"vitrail: {error}", file=sys.stderr)
        return exit_code(error)
    return failures.explain(error)[1] if debug else failures.report(error, words)


def accept_any_character() -> None:
    """Write characters that the terminal or pipe has no code for as ``\\x``, never fail at them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
