"""Which files in a folder are pictures, and how the folder is organized into classes and splits.

    data/CLASS/...                          or      data/train/CLASS/...   data/val/CLASS/...
                                                    data/test/CLASS/...

Split folders are recognized in their usual spellings (Training, training_set, val, valid, seg_test,
train2017, ...), also where an archive repeats a name (training_set/training_set/CLASS). A folder
that looks like splits but cannot be used as such is refused: it is never read as classes.
"""

import functools
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vitrail.config.settings import Split
from vitrail.data.formats import BROKEN, is_heif, quiet, register_heif
from vitrail.errors import DataError, PictureError

SUFFIXES = frozenset((
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".icb", ".ico", ".j2c", ".j2k", ".jfif",
    ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png",
    ".pnm", ".ppm", ".psd", ".qoi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp",
))  # fmt: skip
"""Suffixes that count as pictures when a folder is searched, whatever the content."""
HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))
"""Suffixes that count as pictures if pillow-heif is installed."""
SIGNED = (
    "AVIF", "BLP", "BMP", "DDS", "FITS", "FTEX", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MSP",
    "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "TIFF", "WEBP", "XBM", "XPM",
)  # fmt: skip
"""Formats that Pillow detects by their first bytes: such files may have any suffix, or none."""
SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
SPLIT_NAME = re.compile(
    rf"(?:(?P<prefix>.+)[\W_]+)?(?P<split>{'|'.join(SPLITS)})"
    r"[\W_]*(?:sets?|data|dataset|images?|imgs?|pictures|photos|split|folder)?[\W_]*\d*",
    re.IGNORECASE,
)


class Layout(NamedTuple):
    """The folder of classes of each split; of a single tree, under ``train``, splits are cut."""

    trees: dict[Split, Path]
    one_tree: bool
    unused: tuple[Path, ...]
    """Folders next to the split folders, which are not read."""


def find_layout(data_path: Path) -> Layout:
    """Return how a folder of pictures is organized.

    Raises:
        DataError: there is no such folder, or it looks like splits but cannot be used as such.
    """
    if not data_path.is_dir():
        raise DataError(f"{data_path}: no such folder; give --data_path a folder of class folders")
    root = _without_repeat(data_path)
    folders = _subfolders(root)
    named = _split_folders(folders)
    kinds = {split for split, _ in named}
    if not named or (len(kinds) == 1 and not _is_lone_split(root, named[0][1], folders)):
        return Layout({"train": root}, one_tree=True, unused=())
    trees: dict[Split, Path] = {}
    for split, folder in named:
        if split in trees:
            raise DataError(f"{root}: {trees[split].name}/ and {folder.name}/ are both a {split} "
                            "split: keep one")  # fmt: skip
        trees[split] = folder
    for split, folder in trees.items():
        trees[split] = tree = _without_repeat(folder)
        if not _subfolders(tree):
            raise DataError(
                f"{root}: {folder.name}/ looks like a {split} split, but has no class folders: "
                "put its pictures into one folder per class, or rename it if it is a class"
            )
    unused = tuple(folder for folder in folders if folder not in [path for _, path in named])
    return Layout(trees, one_tree=False, unused=unused)


def _split_folders(folders: list[Path]) -> list[tuple[Split, Path]]:
    """Return the folders that are named as splits, all with the same prefix.

    Among several prefixes the one with the most splits wins: ``seg_train`` and ``seg_test`` are
    splits even next to a class called ``freight train``.
    """
    groups: dict[str, list[tuple[Split, Path]]] = {}
    for folder in folders:
        match = SPLIT_NAME.fullmatch(folder.name)
        if match:
            prefix = (match["prefix"] or "").lower()
            groups.setdefault(prefix, []).append((SPLITS[match["split"].lower()], folder))
    lone = {prefix: group for prefix, group in groups.items() if len({s for s, _ in group}) == 1}
    if len(lone) == len(groups):  # without a second split, only the plain names count
        return groups.get("", [])
    return max(groups.values(), key=lambda group: len({split for split, _ in group}))


def _is_lone_split(root: Path, folder: Path, folders: list[Path]) -> bool:
    """Return whether the only folder named like a split is a split; otherwise it is a class.

    Raises:
        DataError: it is ambiguous.
    """
    if _has_pictures(folder) or not _subfolders(folder):
        return False
    if len(folders) > 1:
        other = next(other for other in folders if other != folder)
        raise DataError(
            f"{root}: {folder.name}/ looks like a split, but {other.name}/ next to it does not: "
            f"rename {folder.name}/ if it is a class, or move {other.name}/ away"
        )
    return True


def _without_repeat(folder: Path) -> Path:
    """Return ``folder/folder`` if ``folder`` contains nothing else, as in many archives."""
    inner = _subfolders(folder)
    repeated = len(inner) == 1 and inner[0].name.lower() == folder.resolve().name.lower()
    return inner[0] if repeated and not _has_pictures(folder) else folder


def _subfolders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted by name."""
    try:
        return sorted(p for p in folder.iterdir() if not _is_hidden(p.name) and p.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error


def _has_pictures(folder: Path) -> bool:
    """Return whether there are pictures directly in a folder."""
    return any(map(is_picture, folder.iterdir()))


def walk_files(root: Path) -> Iterator[Path]:
    """Yield all files below a folder, sorted folder by folder.

    Hidden files and folders (``.git``, ``.ipynb_checkpoints``) and ``__MACOSX`` are skipped; links
    are followed.

    Raises:
        DataError: a folder cannot be read, or a link leads to a folder that contains it.
    """
    yield from _walk(root, frozenset())


def _is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is skipped in every search."""
    return name.startswith(".") or name == "__MACOSX"


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    identity = status.st_dev, status.st_ino
    if identity in above:
        raise DataError(f"{folder}: this link leads to a folder that contains it: remove it")
    for entry in entries:
        if _is_hidden(entry.name):
            continue
        path = folder / entry.name
        if entry.is_dir():
            yield from _walk(path, above | {identity})
        elif entry.is_file():
            yield path


def is_picture(path: Path) -> bool:
    """Return whether a file counts as a picture when a folder is searched; hidden files do not.

    A common suffix is enough, which is fast; any other file is identified by its content.
    """
    if _is_hidden(path.name):
        return False
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return path.is_file()
    if suffix in HEIF_SUFFIXES:
        return path.is_file() and register_heif()
    return _has_picture_content(path)


def _has_picture_content(path: Path) -> bool:
    """Return whether a file starts like one of the formats in SIGNED, or like HEIC."""
    head = _read_head(path)
    if is_heif(head):
        return register_heif()
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return True
    try:
        with quiet, Image.open(path, formats=_signed_formats()):
            return True
    except Image.DecompressionBombError:
        return True
    except BROKEN:
        return False


@functools.cache
def _signed_formats() -> tuple[str, ...]:
    """Return those of SIGNED that this version of Pillow supports."""
    Image.init()
    return tuple(name for name in SIGNED if name in Image.OPEN)


def _read_head(path: Path) -> bytes:
    """Return the first 16 bytes of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError:
        return b""


def left_out_reason(path: Path) -> str:
    """Return the kind of a file that is not a picture, or that cannot be decoded.

    For example ``.mp4``, ``no suffix``, ``.heic (install pillow-heif)`` or ``broken``.
    """
    suffix = path.suffix.lower() or "no suffix"
    heif = path.suffix.lower() in HEIF_SUFFIXES or is_heif(_read_head(path))
    if heif and not register_heif():
        return f"{suffix} (install pillow-heif)"
    return "broken" if is_picture(path) else suffix


def find_pictures(words: Sequence[str]) -> list[Path]:
    """Return the picture files that words name: files, folders (recursively) and glob patterns.

    Raises:
        PictureError: a word matches nothing.
        DataError: a folder cannot be read.
    """
    found: list[Path] = []
    for word in words:
        try:
            paths = _find_word(word)
        except OSError as error:  # name too long, permission denied
            raise PictureError(f"{word:.200}: {error.strerror}") from error
        if not paths:
            nothing = _nothing_in(Path(word)) if Path(word).is_dir() else "no such picture"
            raise PictureError(f"{word}: {nothing}")
        found += paths
    return found


def _find_word(word: str) -> list[Path]:
    """Return the files that one word names."""
    path = Path(word)
    if path.is_dir():
        return [inner for inner in walk_files(path) if is_picture(inner)]
    if path.exists():
        return [path]
    matches = map(Path, glob.glob(word, recursive=True))  # noqa: PTH207 (absolute and relative)
    return sorted(match for match in matches if match.is_file())


def _nothing_in(folder: Path) -> str:
    """Return a message that a folder has no picture, and what it has instead."""
    kinds = Counter(map(left_out_reason, walk_files(folder)))
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    return f"no picture in this folder{f', only {counts}' if counts else ''}"
