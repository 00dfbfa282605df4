"""Atomic file writing: a file is written completely or not at all."""

import contextlib
import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from vitrail.errors import OutputError


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until a folder's renames are on disk, where the file system can do so."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC):  # CIFS and FUSE raise others
            raise


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: readers see the old file or the new one.

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
        with contextlib.suppress(OSError):  # it is useless, and the disk may be full
            partial.unlink()
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file for people to read."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # File names that are not UTF-8 contain surrogates, which only escaped are valid JSON.
    replace_file(path, text.encode(errors="backslashreplace"))


def write_json_lines(path: Path, rows: list[Any]) -> None:
    """Write one JSON value per line."""
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def require_writable(folder: Path) -> None:
    """Raise OutputError if a folder could not be created and written to; create nothing."""
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written: {error.strerror}: give another path"
        ) from error
