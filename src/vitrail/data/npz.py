"""NumPy's .npz files of pictures and labels, as MedMNIST and Keras publish them.

    train_images  train_labels  val_images  val_labels  test_images  test_labels     (MedMNIST)
    x_train       y_train                               x_test       y_test          (Keras)
    images        labels        or        X  y              not split: vitrail splits it

``classes``, an array of names in the order of the labels, is optional. Objects, which would run
code, are never loaded. Source: Yang et al. 2023, arXiv:2110.14795 (MedMNIST).
"""

import functools
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from vitrail.config.settings import Split
from vitrail.data.arrays import ArraySource, Part, check_arrays
from vitrail.errors import DataError

NAMES: tuple[tuple[Split, str, str], ...] = (
    ("train", "train_images", "train_labels"), ("train", "x_train", "y_train"),
    ("train", "images", "labels"), ("train", "X", "y"),
    ("validation", "val_images", "val_labels"), ("validation", "x_val", "y_val"),
    ("test", "test_images", "test_labels"), ("test", "x_test", "y_test"),
)  # fmt: skip
"""Names of the arrays of pictures and labels of a split."""
CLASSES = "classes"


def open_npz(data_path: Path) -> ArraySource:
    """Return the dataset in an .npz file.

    Raises:
        DataError: it cannot be read, is not an .npz file, or lacks pictures or labels.
    """
    try:
        with zipfile.ZipFile(data_path) as archive:
            there = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "not an .npz file"
        raise DataError(f"{data_path}: {reason}: give --data_path a file of arrays") from error
    parts: dict[Split, Part] = {}
    for split, images, labels in NAMES:
        if images not in there and labels not in there:
            continue
        for key in (images, labels):
            if key not in there:
                raise DataError(f"{data_path}: {key} is missing (it has {_listed(there)})")
        if split in parts:
            raise DataError(f"{data_path}: {images} is a second {split} split: keep one")
        parts[split] = _open_part(data_path, images, labels)
    if not parts:
        raise DataError(
            f"{data_path}: no arrays train_images and train_labels, x_train and y_train, or "
            f"images and labels (it has {_listed(there)})"
        )
    names = _read(data_path, CLASSES).reshape(-1).tolist() if CLASSES in there else []
    return ArraySource(str(data_path), parts, dict(enumerate(map(str, names))))


def _open_part(path: Path, images: str, labels: str) -> Part:
    """Return the pictures and labels of one split; the pictures are read when they are needed."""
    shape, kind = _header(path, images)
    labels_B, gray = check_arrays(f"{path}: {images}", shape, _read(path, labels), kind=kind)
    pictures = functools.cache(lambda: _read(path, images))
    return Part(labels_B, gray, lambda indices_B: pictures()[indices_B])


def _header(path: Path, key: str) -> tuple[tuple[int, ...], "np.dtype[np.generic]"]:
    """Return the shape and type of an array without reading it."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            old = read_magic(file) == (1, 0)
            shape, _, kind = (read_array_header_1_0 if old else read_array_header_2_0)(file)
    except Exception as error:  # NumPy raises many kinds
        raise DataError(f"{path}: {key} cannot be read: {error}") from error
    return shape, kind


def _read(path: Path, key: str) -> np.ndarray:
    """Return an array."""
    try:
        with np.load(path, allow_pickle=False) as file:
            array: np.ndarray = file[key]
    except Exception as error:  # NumPy raises many kinds
        raise DataError(f"{path}: {key} cannot be read: {error}") from error
    return array


def _listed(names: list[str]) -> str:
    """Return the first names of arrays, for a message."""
    return ", ".join(names[:8]) or "none"
