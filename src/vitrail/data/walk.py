"""The files below a folder, in one order on every system."""

import os
from collections.abc import Iterator
from pathlib import Path

from vitrail.errors import DataError


def walk_files(root: Path) -> Iterator[Path]:
    """Yield all files below a folder, sorted folder by folder.

    Hidden files and folders (``.git``, ``.ipynb_checkpoints``) and ``__MACOSX`` are skipped; links
    are followed.

    Raises:
        DataError: a folder cannot be read, or a link leads back to a folder that contains it.
    """
    yield from _walk(root, frozenset())


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is left out of every search."""
    return name.startswith(".") or name == "__MACOSX"


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    identity = status.st_dev, status.st_ino
    if identity in above:
        raise DataError(f"{folder}: this link leads back to a folder that contains it: remove it")
    for entry in entries:
        if is_hidden(entry.name):
            continue
        path = folder / entry.name
        if entry.is_dir():
            yield from _walk(path, above | {identity})
        elif entry.is_file():
            yield path
