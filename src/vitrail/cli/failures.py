"""Exceptions of other libraries -> one line with a remedy; the traceback goes to a file."""

import errno
import os
import platform
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from vitrail.errors import printable

COULD_NOT, UNEXPECTED = 1, 70
"""Exit codes: the machine refused (memory, disk, a broken library); a bug in Vitrail (EX_SOFTWARE
of sysexits.h)."""
LONGEST = 300
"""Characters of another library's message that are shown."""

OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad alloc|bad_alloc|Unable to allocate",
    re.IGNORECASE,
)
AMOUNT = re.compile(r"allocate (\d[\d.,]* \w+)")
ANOTHER_PLACE = "choose another place"
PLACES = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter name",
}
"""What to do about an error of the system; for all others, ANOTHER_PLACE."""


def report(error: Exception, args: Sequence[str]) -> int:
    """Print one line about an exception, write its traceback to a file; return the exit code."""
    message, code = explain(error)
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    path = _write_traceback(error, args)
    where = f" (traceback: {path})" if path else ""
    print(f"vitrail: {printable(message + notes)}{where}", file=sys.stderr)
    return code


def explain(error: Exception) -> tuple[str, int]:
    """Return what went wrong and what to do about it, and the exit code."""
    text = _first_line(error)
    if _is_out_of_memory(error):
        amount = AMOUNT.search(str(error))
        size = f" (asked for {amount[1]})" if amount else ""
        return (
            f"out of memory{size}: lower --batch_size, raise --accumulate (train), or use fewer "
            "or smaller images",
            COULD_NOT,
        )
    if isinstance(error, UnicodeError):
        return f"{text}: set PYTHONUTF8=1, so that Python reads and writes UTF-8", COULD_NOT
    if isinstance(error, ImportError):
        return f"a library cannot be imported: {text}: reinstall it", COULD_NOT
    if isinstance(error, OSError):
        place = error.filename if error.filename is not None else "standard output or a file"
        remedy = PLACES.get(error.errno or 0, ANOTHER_PLACE)
        return f"{_shorten(os.fsdecode(str(place)))}: {error.strerror or text}: {remedy}", COULD_NOT
    return f"unexpected {type(error).__name__}: {text}: please report it", UNEXPECTED


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out: of Python, NumPy, or of torch's CPU or GPU allocator."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def _first_line(error: Exception) -> str:
    """Return the first line of an exception's message; its type where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _shorten(lines[0].rstrip(".")) if lines else type(error).__name__


def _shorten(text: str) -> str:
    """Return a text cut to LONGEST characters."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _write_traceback(error: Exception, args: Sequence[str]) -> str:
    """Write the traceback to the system's folder of temporary files; return the path, or ""."""
    head = (
        f"vitrail {version('vitrail')}, Python {platform.python_version()}, {platform.platform()}\n"
        f"arguments: {shlex.join(args)}\n\n"
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
    return file.name
