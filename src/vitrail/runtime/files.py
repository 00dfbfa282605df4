"""Files written whole or not at all."""

import contextlib
import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from vitrail.errors import OutputError

CANNOT_FLUSH = (
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM,
    errno.EBADF, errno.EISDIR,
)  # fmt: skip
"""What a file system answers that does not flush folders (CIFS, FUSE): the rename has succeeded."""


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: a reader sees the old or the new, whole.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(partial, content)
        partial.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # half a file helps nobody, and the disk may be full
            partial.unlink()
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people to read."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # Names of files that are no UTF-8 hold half characters; with a backslash they are JSON.
    replace_file(path, text.encode(errors="backslashreplace"))


def write_json_lines(path: Path, rows: list[Any]) -> None:
    """Write one JSON value a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(path, text.encode(errors="backslashreplace"))


def require_writable(folder: Path) -> None:
    """Refuse a folder that could not be made or written, without making it.

    Raises:
        OutputError: the folder, or the nearest one above it that exists, takes no file.
    """
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written: {error.strerror}: give another path"
        ) from error


def flush_folder(folder: Path) -> None:
    """Wait until the disk has a folder's renames, where the system can flush folders.

    Raises:
        OSError: the disk failed.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
