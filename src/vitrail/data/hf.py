"""Datasets on the Hugging Face hub, and local Parquet or Arrow files, with the datasets library.

    hf:OWNER/NAME    hf:OWNER/NAME:CONFIGURATION    hf:OWNER/NAME@REVISION    (on the hub)
    photos/          photos.parquet                 what save_to_disk wrote   (local)

The columns are recognized by their types: one of pictures, one of classes.
"""

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrail.config.settings import Split
from vitrail.data.arrays import ArraySource, Part, check_labels
from vitrail.data.formats import DECODE_ERRORS, is_wide_gray
from vitrail.data.manifest import SPLIT_WORDS
from vitrail.errors import DataError, import_optional

PREFIX = "hf:"
"""Prefix of a dataset or a model on the hub."""
HUB_NAME = re.compile(r"hf:(?P<path>[^:@]+)(?::(?P<name>[^@]+))?(?:@(?P<revision>.+))?")
SAVED = ("dataset_dict.json", "state.json")
"""Files that save_to_disk writes, for several splits and for one."""
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "y")
PICTURE_COLUMNS = ("image", "img", "picture")
UNLABELED = -1
"""The label of pictures whose class is kept secret, such as ImageNet's test split."""
LOOKED_AT = 64
"""Number of pictures, evenly spaced, that are checked to see whether a split is gray."""


def is_on_hub(name: str | Path) -> bool:
    """Return whether this names a dataset or a model on the hub, not a file or folder."""
    return str(name).startswith(PREFIX)


def open_hf(data_path: Path) -> ArraySource:
    """Return the dataset of this name or path; one on the hub is downloaded into its cache.

    Raises:
        DataError: it cannot be found or read, or its columns are not those of labeled pictures.
        ConfigError: the datasets library is not installed.
    """
    splits = _load(data_path)
    parts: dict[Split, Part] = {}
    classes: dict[int, str] = {}
    for name, data in splits.items():
        split = SPLIT_WORDS.get(name.lower()) if len(splits) > 1 else "train"
        if split is None or not len(data):
            continue
        part, names = _open_part(f"{data_path.as_posix()}: {name}", data)
        classes = classes or names
        if (part.labels_B != UNLABELED).any():
            parts[split] = part
    return ArraySource(data_path.as_posix(), parts, classes)


def _load(data_path: Path) -> Mapping[str, Any]:
    """Return the splits of a dataset, by their names in it."""
    datasets, text = import_optional("datasets"), data_path.as_posix()
    local: dict[str, Any] = {"path": "parquet"}
    if data_path.is_file():
        local["data_files"] = text
    elif data_path.is_dir():
        if not any(data_path.rglob("*.parquet")):
            local["path"] = "arrow"
        local["data_dir"] = text
    elif not is_on_hub(data_path):
        raise DataError(f"{text}: no such file or folder; for the hub, give {PREFIX}OWNER/NAME")
    try:
        if any((data_path / name).is_file() for name in SAVED):
            loaded = datasets.load_from_disk(text)
            return loaded if isinstance(loaded, Mapping) else {"train": loaded}
        match = HUB_NAME.fullmatch(text)
        options = match.groupdict() if match else local
        return dict(datasets.load_dataset(**options))
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{text}: cannot be read by the datasets library: {reason}") from error


def _open_part(name: str, data: Any) -> tuple[Part, dict[int, str]]:
    """Return the pictures and labels of a split, and the names of its classes."""
    datasets = import_optional("datasets")
    features = data.features
    pictures = [key for key, feature in features.items() if _is_picture(feature)]
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [key for key in LABEL_COLUMNS if key in features]
    picture = _only(name, "pictures", pictures, PICTURE_COLUMNS, list(features))
    label = _only(name, "labels", classes or named, LABEL_COLUMNS, list(features))
    names = dict(enumerate(features[label].names)) if label in classes else {}
    encoded = data.cast_column(picture, datasets.Image(decode=False))

    def read(indices_B: np.ndarray) -> list[bytes]:
        rows = encoded[indices_B.tolist()][picture]
        return [row["bytes"] or Path(row["path"]).read_bytes() for row in rows]

    some = np.unique(np.linspace(0, len(data) - 1, LOOKED_AT).astype(int))
    gray = all(map(_is_gray, read(some)))
    return Part(check_labels(name, np.array(data[label][:])), gray, read), names


def _is_picture(feature: Any) -> bool:
    """Return whether a column holds pictures, or the contents of their files."""
    datasets = import_optional("datasets")
    binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or binary or (
        isinstance(feature, Mapping) and "bytes" in feature
    )  # fmt: skip


def _only(
    name: str, what: str, columns: list[str], usual: tuple[str, ...], there: list[str]
) -> str:
    """Return the only column of a kind, or the one with a usual name."""
    preferred = [column for column in usual if column in columns]
    if len(columns) == 1 or preferred:
        return (preferred or columns)[0]
    found = f"{len(columns)} columns" if columns else "no column"
    raise DataError(f"{name}: {found} of {what} among {', '.join(there)}: rename one to {usual[0]}")


def _is_gray(content: bytes) -> bool:
    """Return whether the content of a file is a gray picture."""
    with contextlib.suppress(*DECODE_ERRORS), Image.open(io.BytesIO(content)) as image:
        return image.mode in ("1", "L") or is_wide_gray(image)
    return False
