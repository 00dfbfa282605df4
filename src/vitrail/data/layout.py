"""How a folder of pictures is organized: one tree of classes, or one tree for each split.

    data/CLASS/...                          or      data/train/CLASS/...   data/val/CLASS/...
                                                    data/test/CLASS/...

Split folders are recognized in their usual spellings (Training, training_set, val, valid, seg_test,
train2017, ...), also where an archive repeats a name (training_set/training_set/CLASS). A folder
that looks like splits but cannot be used as such is refused: it is never read as classes.
"""

import re
from pathlib import Path
from typing import NamedTuple

from vitrail.config.settings import Split
from vitrail.data.pictures import is_picture
from vitrail.data.walk import is_hidden
from vitrail.errors import DataError

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
    """Where the classes are, by split; a single tree under ``train`` means that splits are cut."""

    trees: dict[Split, Path]
    one_tree: bool
    unused: tuple[Path, ...]
    """Folders beside the split folders, which are not read."""


def find_layout(data_path: Path) -> Layout:
    """Return how a folder of pictures is organized.

    Raises:
        DataError: there is no such folder, or it looks like splits but cannot be used as such.
    """
    if not data_path.is_dir():
        raise DataError(f"{data_path}: no such folder; give --data_path a folder of class folders")
    root = without_repeat(data_path)
    folders = subfolders(root)
    named = split_folders(folders)
    kinds = {split for split, _ in named}
    if not named or (len(kinds) == 1 and not is_lone_split(root, named[0][1], folders)):
        return Layout({"train": root}, one_tree=True, unused=())
    trees: dict[Split, Path] = {}
    for split, folder in named:
        if split in trees:
            raise DataError(f"{root}: {trees[split].name}/ and {folder.name}/ are both a {split} "
                            "split: keep one")  # fmt: skip
        trees[split] = folder
    for split, folder in trees.items():
        trees[split] = tree = without_repeat(folder)
        if not subfolders(tree):
            raise DataError(
                f"{root}: {folder.name}/ looks like a {split} split, but has no class folders: "
                "put its pictures into one folder per class, or rename it if it is a class"
            )
    unused = tuple(folder for folder in folders if folder not in [path for _, path in named])
    return Layout(trees, one_tree=False, unused=unused)


def split_folders(folders: list[Path]) -> list[tuple[Split, Path]]:
    """Return the folders that are named as splits, all with the same prefix.

    Of several prefixes the one with the most splits is meant: ``seg_train`` and ``seg_test`` are
    splits beside a class called ``freight train``.
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


def is_lone_split(root: Path, folder: Path, folders: list[Path]) -> bool:
    """Return whether the only folder that is named as a split is one; else it is a class.

    Raises:
        DataError: it could be either.
    """
    if has_pictures(folder) or not subfolders(folder):
        return False
    if len(folders) > 1:
        other = next(other for other in folders if other != folder)
        raise DataError(
            f"{root}: {folder.name}/ looks like a split, but {other.name}/ beside it does not: "
            f"rename {folder.name}/ if it is a class, or move {other.name}/ away"
        )
    return True


def without_repeat(folder: Path) -> Path:
    """Return ``folder/folder`` where that is all there is in ``folder``, as archives have it."""
    inner = subfolders(folder)
    repeated = len(inner) == 1 and inner[0].name.lower() == folder.resolve().name.lower()
    return inner[0] if repeated and not has_pictures(folder) else folder


def subfolders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted by name."""
    try:
        return sorted(p for p in folder.iterdir() if not is_hidden(p.name) and p.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error


def has_pictures(folder: Path) -> bool:
    """Return whether there are pictures directly in a folder."""
    return any(map(is_picture, folder.iterdir()))
