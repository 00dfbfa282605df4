"""IDX files, as MNIST, Fashion-MNIST, KMNIST and EMNIST are published, unpacked or as gzip.

    train-images-idx3-ubyte.gz   train-labels-idx1-ubyte.gz   t10k-images-idx3-ubyte.gz   ...
    emnist-letters-train-images-idx3-ubyte.gz   ...   emnist-letters-mapping.txt

Source: http://yann.lecun.com/exdb/mnist (the format); Cohen et al. 2017, arXiv:1702.05373 (EMNIST).
"""

import functools
import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from vitrail.config.settings import Split
from vitrail.data.arrays import ArraySource, Part, check_arrays
from vitrail.errors import DataError

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
SPLITS: dict[str, Split] = {"train": "train", "t10k": "test", "test": "test", "val": "validation"}
NAME = re.compile(
    rf"(?P<set>.*?)[-_.]?(?P<split>{'|'.join(SPLITS)})[-_.](?P<kind>images|labels)[-_.]idx.*"
)
TRANSPOSED = "emnist"
"""EMNIST stores its pictures column by column; its file names begin with this."""
CLASSES = "classes.txt"
"""An optional file of class names, one per line, in the order of the labels."""

HEADER = 20
"""Bytes of the longest header, for 4 dimensions."""

Files = dict[Split, dict[str, Path]]


def open_idx(data_path: Path) -> ArraySource:
    """Return the dataset in a folder; if it has several, the one that ``folder/NAME`` names.

    Raises:
        DataError: no such files, several datasets, or files that are not IDX.
    """
    folder, name, files = _find_files(data_path)
    parts: dict[Split, Part] = {}
    for split, pair in files.items():
        for kind in ("images", "labels"):
            if kind not in pair:
                there = next(iter(pair.values()))
                raise DataError(f"{there}: the matching file of {kind} is missing")
        parts[split] = _open_part(pair["images"], pair["labels"], name.startswith(TRANSPOSED))
    return ArraySource(str(data_path), parts, _class_names(folder, name))


def has_idx(folder: Path) -> bool:
    """Return whether a folder holds IDX files, going by their names."""
    return folder.is_dir() and any(NAME.fullmatch(path.name) for path in folder.iterdir())


def _find_files(data_path: Path) -> tuple[Path, str, Files]:
    """Return the folder and the name of the dataset, and its files by split and kind."""
    folder, wanted = (data_path, None) if data_path.is_dir() else (data_path.parent, data_path.name)
    if (folder / "raw").is_dir():  # as torchvision unpacks them
        folder = folder / "raw"
    found: dict[str, Files] = {}
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:  # an unpacked file comes before its .gz
        if path.is_file() and (match := NAME.fullmatch(path.name)):
            files = found.setdefault(match["set"], {})
            files.setdefault(SPLITS[match["split"]], {}).setdefault(match["kind"], path)
    if not found:
        raise DataError(f"{data_path}: no IDX files here, such as train-images-idx3-ubyte.gz")
    if wanted is None and len(found) == 1:
        wanted = next(iter(found))
    if wanted in found:
        return folder, wanted, found[wanted]
    sets = ", ".join(str(folder / name) for name in found)
    raise DataError(f"{data_path}: give --data_path one of {sets}")


def _open_part(images: Path, labels: Path, transposed: bool) -> Part:
    """Return the pictures and labels of one split; the pictures are read when they are needed."""
    values, (kind, shape, _) = _read_idx(labels), _header(images, _content(images, HEADER))
    for path, array_shape, wanted in ((images, shape, 3), (labels, values.shape, 1)):
        if len(array_shape) != wanted:
            raise DataError(f"{path}: an array of {len(array_shape)} dimensions, not {wanted}")
    labels_B, gray = check_arrays(str(images), shape, values, kind=kind)

    @functools.cache
    def pictures() -> np.ndarray:
        return _read_idx(images).swapaxes(1, 2) if transposed else _read_idx(images)

    return Part(labels_B, gray, lambda indices_B: pictures()[indices_B])


def _read_idx(path: Path) -> np.ndarray:
    """Return the array in an IDX file, which may be compressed by gzip.

    Raises:
        DataError: it cannot be read, is not IDX, or is truncated.
    """
    content = _content(path)
    kind, shape, start = _header(path, content)
    needed = math.prod(shape) * kind.itemsize
    if len(content) - start != needed:
        raise DataError(
            f"{path}: {len(content) - start:,} bytes of data, but its header announces {needed:,} "
            f"({' x '.join(map(str, shape))}): download it again"
        )
    array = np.frombuffer(content, kind, offset=start).reshape(shape)
    return array.astype(kind.newbyteorder("="), copy=False)


def _content(path: Path, size: int = -1) -> bytes:
    """Return the first bytes of a file, unpacked; default: all."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as opened:
            return opened.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}: download it again") from error


def _header(path: Path, content: bytes) -> tuple["np.dtype[np.generic]", tuple[int, ...], int]:
    """Return the type and shape of the array in an IDX file, and where its numbers begin."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES:
        raise DataError(f"{path}: not an IDX file (it begins with {content[:12]!r})")
    n_dimensions = content[3]
    start = 4 + 4 * n_dimensions
    if n_dimensions > 4 or len(content) < start:
        raise DataError(f"{path}: not an IDX file, or truncated: download it again")
    shape = struct.unpack(f">{n_dimensions}I", content[4:start])
    return np.dtype(TYPES[content[2]]), shape, start


def _class_names(folder: Path, name: str) -> dict[int, str]:
    """Return the names in classes.txt or in EMNIST's mapping; empty if there is neither."""
    own, mapping = folder / CLASSES, folder / f"{name}-mapping.txt"
    try:
        if own.is_file():
            lines = own.read_text(encoding="utf-8-sig").splitlines()
            return dict(enumerate(line.strip() for line in lines if line.strip()))
        if mapping.is_file():
            return _read_mapping(mapping.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise DataError(f"{own if own.is_file() else mapping}: cannot be read: {error}") from error
    return {}


def _read_mapping(text: str) -> dict[int, str]:
    """Return the character of each of EMNIST's labels; a line has a label and its codes."""
    rows = sorted(tuple(map(int, line.split()[:2])) for line in text.splitlines())
    return {label: chr(code) for label, code in rows}
