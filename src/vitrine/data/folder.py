"""Class-named folders of pictures, of any size and kind.

    data_path/train/CLASS/*  and  data_path/test/CLASS/*      or      data_path/CLASS/*

Beside train/ and test/ nothing is read, a val/ neither: validation is always cut from train/. Of
one tree, a fixed tenth of each class is the test split (one picture at least, if the class has
two): those whose relative names have the lowest hashes, whatever the machine and its listing.
"""

import hashlib
import logging
import sys
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from vitrine.data.images import ImageSet
from vitrine.data.pictures import Fit, fit_picture, is_picture, read_picture
from vitrine.errors import DataError, PictureError

log = logging.getLogger("vitrine")


def load_folder(
    data_path: Path,
    which: Literal["train", "test"],
    *,
    size_hw: tuple[int, int],
    fit: Fit,
    num_workers: int,
) -> ImageSet:
    """Decode the pictures of a split, each once, in parallel.

    A file that cannot be read is named in a warning and left out.

    Raises:
        DataError: there are no classes or no readable pictures, or the test split has a class
            that training lacks.
    """
    classes, labelled = list_split(data_path, which)
    paths = [path for path, _ in labelled]
    pictures = decode(paths, size_hw=size_hw, fit=fit, num_workers=num_workers)
    sound = [index for index, picture in enumerate(pictures) if not isinstance(picture, str)]
    for picture in pictures:
        if isinstance(picture, str):
            log.warning("left out: %s", picture)
    if len(sound) < len(pictures):
        log.warning("%d of %d pictures left out", len(pictures) - len(sound), len(pictures))
    if not sound:
        raise DataError(f"{data_path}: no picture of the {which} split can be read")
    raw_BHWC = np.stack([pictures[index] for index in sound])
    labels = [labelled[index][1] for index in sound]
    raw_BCHW = torch.from_numpy(raw_BHWC).permute(0, 3, 1, 2).contiguous()
    return ImageSet(raw_BCHW, torch.tensor(labels), classes)


def list_split(
    data_path: Path, which: Literal["train", "test"]
) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Return the classes, and each picture of the split with its label."""
    if not data_path.is_dir():
        raise DataError(
            f"{data_path}: no such folder; give --data_path with a folder for each class"
        )
    two_trees = bool(list_classes(data_path / "train"))
    root = data_path / "train" if two_trees else data_path
    classes = list_classes(root)
    if len(classes) < 2:
        raise DataError(
            f"{root}: {len(classes)} folders with pictures in them, but a classifier needs one for "
            "each of at least 2 classes"
        )
    if two_trees:
        tree = list_tree(data_path / which, classes)
        return classes, [(path, label) for label, paths in enumerate(tree) for path in paths]
    chosen = []
    for label, paths in enumerate(list_tree(root, classes)):
        ranked = sorted(paths, key=lambda path: name_hash(path.relative_to(root)))
        n_test = min(len(paths) - 1, max(1, round(len(paths) / 10)))
        part = ranked[:n_test] if which == "test" else ranked[n_test:]
        chosen += [(path, label) for path in sorted(part)]
    return classes, chosen


def list_tree(root: Path, classes: Sequence[str]) -> list[list[Path]]:
    """Return the pictures of each class in a tree."""
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder, but train/ is there beside it: make it, with classes"
        )
    strange = sorted(set(list_classes(root)) - set(classes))
    if strange:
        raise DataError(f"{root}: class {strange[0]!r} is not among the training classes")
    return [
        sorted(path for path in (root / name).rglob("*") if is_picture(path)) for name in classes
    ]


def list_classes(root: Path) -> tuple[str, ...]:
    """Return the sorted names of the folders that hold pictures, hidden ones apart."""
    folders = [path for path in root.glob("[!.]*") if path.is_dir()]
    return tuple(
        sorted(path.name for path in folders if any(is_picture(p) for p in path.rglob("*")))
    )


def name_hash(path: Path) -> bytes:
    """Return a hash of a relative name, the same on every system (some decompose accents)."""
    name = unicodedata.normalize("NFC", path.as_posix())
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()  # it may be no UTF-8


def decode(
    paths: Sequence[Path], *, size_hw: tuple[int, int], fit: Fit, num_workers: int
) -> list[np.ndarray | str]:
    """Return each picture as bytes (H, W, 3), or what is wrong with it."""

    def one(path: Path) -> np.ndarray | str:
        try:
            return fit_picture(read_picture(path), size_hw, fit)
        except PictureError as error:
            return str(error)

    with ThreadPoolExecutor(num_workers) as pool:
        decoded = pool.map(one, paths)
        silent = not sys.stderr.isatty()
        console = Console(stderr=True)
        return list(track(decoded, "decoding", len(paths), console=console, disable=silent))
