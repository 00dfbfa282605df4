"""The command line: arguments in, exit codes out. Heavy imports are inside the commands.

Exit codes:
    0        success
    1        partial success, or the command could not continue: a loss that is not finite, out of
             memory, a full disk, a library that cannot be imported
    2        refused: a mistake in the command, its settings, data or weights
    70       an error in Vitrail itself; the traceback is in the file that the message names
    128 + n  stopped by signal n
"""

import importlib
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence

from vitrail.cli import process
from vitrail.errors import ConfigError, TrainingError, VitrailError, nearest

STARTED = time.perf_counter()
"""When the program started, almost."""

COMMANDS = {
    "train": "train a Vision Transformer, or resume a run",
    "test": "evaluate a model on a data set",
    "predict": "classify pictures",
    "explain": "show what a model looked at in a picture",
    "inspect": "show a model's filters, positions and heads",
    "convert": "convert weights from and to other libraries",
    "push": "upload a model to the Hugging Face hub",
    "export": "export a model to ONNX or torch.export",
    "sweep": "search for good settings",
    "info": "show presets, runs, this machine, or one model",
}

USAGE = """\
Vitrail: train a Vision Transformer on small images, test it, and see what it looks at.

usage: vitrail COMMAND [OPTIONS]       (vitrail COMMAND --help for its options)

{commands}

Start here:
  vitrail predict --model_path cifar10 cat.png    with the bundled model
  vitrail explain --model_path cifar10 cat.png    what it looked at, as an animation
  vitrail train --preset quick                    2 to 6 minutes on a CPU, no data needed

--debug with any command prints the traceback of an error. Exit codes: 0 success; 1 partial
success, or it could not continue (memory, disk, a loss that is not finite); 2 refused; 70 an error
in Vitrail itself; 128 + n stopped by signal n.
"""

DEBUG = "--debug"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    return guarded(_dispatch, sys.argv[1:] if argv is None else argv)


def _dispatch(args: Sequence[str]) -> int:
    """Print --help or --version, or run a command."""
    if not args or args[0] in ("-h", "--help"):
        lines = (f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
        print(USAGE.format(commands="\n".join(lines)), end="")
        return 0 if args else 2
    if args[0] == "--version":
        import vitrail

        print(f"vitrail {vitrail.__version__}")
        return 0
    return run(args[0], args[1:])


def run(command: str, args: Sequence[str]) -> int:
    """Run one command; exceptions are left to the caller."""
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise ConfigError(f"unknown command {command!r}{nearest(command, COMMANDS)}: {known}")
    if command != "train":
        _refuse_many_processes(command)
    warnings.filterwarnings("ignore", module=r"PIL\b")  # about metadata and sizes of pictures
    module = importlib.import_module(f"vitrail.cli.{command}")
    process.limit_spinning()
    return int(module.command(args))


def _refuse_many_processes(command: str) -> None:
    """Refuse a command that several processes would only repeat.

    Raises:
        ConfigError: torchrun started more than one.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        if os.environ.get("RANK") != "0":
            sys.exit(2)
        raise ConfigError(f"vitrail {command} runs in one process: start it without torchrun")


def exit_code(error: VitrailError) -> int:
    """Return the exit code for an exception of ours."""
    return 1 if isinstance(error, TrainingError) else 2


def guarded(command: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    """Run a command; turn every exception into one line on standard error and an exit code.

    ``--debug`` prints the traceback instead.
    """
    process.keep_freed_memory()
    _accept_any_character()
    debug = DEBUG in args
    args = [arg for arg in args if arg != DEBUG]
    try:
        code = command(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, so that a full disk behind a pipe is reported, too
    except KeyboardInterrupt:  # outside of training, where there is nothing to save
        print("vitrail: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `vitrail info | head`
        sys.stdout = None
        return 1
    except Exception as error:  # noqa: BLE001 (the edge of the program)
        return _conclude(error, args, debug=debug)
    return code


def _conclude(error: Exception, args: Sequence[str], *, debug: bool) -> int:
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
    return failures.explain(error)[1] if debug else failures.report(error, args)


def _accept_any_character() -> None:
    """Escape characters that the encoding of the terminal or pipe lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
