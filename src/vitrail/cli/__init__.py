"""The command line: arguments in, exit codes out (USAGE lists them).

Heavy imports are inside the commands.
"""

import errno
import importlib
import io
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence

from vitrail.cli import process
from vitrail.errors import ConfigError, TrainingError, VitrailError, nearest, printable

STARTED = time.perf_counter()
"""About when the program started."""

COMMANDS = {
    "train": "train a Vision Transformer, or resume a run",
    "test": "evaluate a model on a dataset",
    "predict": "classify pictures",
    "explain": "show what a model looked at in a picture",
    "serve": "serve predictions over HTTP, with a web page to try models",
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
  vitrail predict cifar10 cat.jpg    with the bundled model
  vitrail explain cifar10 cat.jpg    what it looked at, as an animation
  vitrail train --preset quick       2 to 4 minutes on a CPU, no data needed

--debug with any command prints the traceback of an error. Exit codes: 0 success; 1 partial
success, or it could not continue (memory, disk, a broken library, a loss that is not finite); 2
refused: a mistake in the command, its settings, data or weights; 70 an error in Vitrail itself;
128 + n stopped by signal n.
"""

DEBUG = "--debug"
COULD_NOT, REFUSED, UNEXPECTED = 1, 2, 70
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad.alloc|unable to allocate", re.I
)
LONGEST = 300
"""Maximum number of characters shown of another library's message."""


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
    several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if several and command != "train":
        if os.environ.get("RANK") != "0":
            sys.exit(REFUSED)  # the first process reports it
        raise ConfigError(f"vitrail {command} runs in one process: start it without torchrun")
    module = importlib.import_module(f"vitrail.cli.{command}")
    process.limit_spinning()
    return int(module.command(args))


def guarded(command: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    """Run a command; turn every exception into one line on standard error and an exit code.

    ``--debug`` prints the traceback instead.
    """
    warnings.filterwarnings("ignore", module=r"PIL\b")  # about metadata and sizes of pictures
    process.keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its encoding may lack characters of file names
            stream.reconfigure(errors="backslashreplace")
    debug = DEBUG in args
    args = [arg for arg in args if arg != DEBUG]
    try:
        code = command(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, so that a full disk behind a pipe is reported, too
    except KeyboardInterrupt:  # outside of training, where there is nothing to save
        print("vitrail: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone, e.g. `vitrail info | head`
        sys.stdout = None
        return COULD_NOT
    except Exception as error:  # noqa: BLE001 (the outermost handler)
        return _report(error, args, debug=debug)
    return code


def _report(error: Exception, args: Sequence[str], *, debug: bool) -> int:
    """Print one line about an exception, or its traceback; return the exit code."""
    if isinstance(error, OSError) and error.filename is None:
        sys.stdout = None  # it may be what failed; Python would flush it again at exit
    message, code = describe_error(error)
    if debug:
        import traceback

        traceback.print_exception(error)
    elif isinstance(error, VitrailError):
        print(f"vitrail: {message}", file=sys.stderr)
    else:
        line = printable("; ".join([message, *getattr(error, "__notes__", ())]))
        print(f"vitrail: {line}{_write_traceback(error, args)}", file=sys.stderr)
    return code


def describe_error(error: Exception) -> tuple[str, int]:
    """Return what went wrong and what to do about it, and the exit code."""
    if isinstance(error, VitrailError):
        return str(error), COULD_NOT if isinstance(error, TrainingError) else REFUSED
    text = str(error).strip().partition("\n")[0][:LONGEST].rstrip(".") or type(error).__name__
    memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if memory or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return (
            "out of memory: lower --batch_size, raise --accumulate (train), or use fewer or "
            f"smaller images ({text})",
            COULD_NOT,
        )
    if isinstance(error, ImportError):
        return f"a library cannot be imported: {text}: reinstall it", COULD_NOT
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space, or choose another disk" if full else "choose another place"
        place = os.fsdecode(str(error.filename or "standard output or a file"))[:LONGEST]
        return f"{place}: {error.strerror or text}: {remedy}", COULD_NOT
    return f"unexpected {type(error).__name__}: {text}: please report it", UNEXPECTED


def _write_traceback(error: Exception, args: Sequence[str]) -> str:
    """Write the traceback to a temporary file; return where it is, or "" if that failed."""
    import platform
    import shlex
    import tempfile
    import traceback

    import vitrail

    head = (
        f"vitrail {vitrail.__version__}, Python {platform.python_version()}, "
        f"{platform.platform()}\narguments: {shlex.join(args)}\n\n"
    )
    text = head + "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="vitrail-error-", suffix=".txt", delete=False,
            encoding="utf-8", errors="backslashreplace",
        ) as file:  # fmt: skip
            file.write(text)
    except OSError:
        return ""
    return f" (traceback: {file.name})"
