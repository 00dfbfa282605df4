"""Pictures and labels in arrays (of a file or in memory): their classes and splits. No torch.

A source has parts: train, and perhaps validation and test. Missing parts are cut from train, always
the same items: for validation a tenth, or as many as the settings request; for test a tenth of each
class, but only if the source is not split at all.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

import numpy as np

from vitrail.config.settings import DataConfig, Split
from vitrail.data import formats
from vitrail.data.formats import PixelRange
from vitrail.data.splits import choose, shares, tenth_of_each, validation_shares
from vitrail.errors import DataError

BLOCK = 4096
"""Number of pictures whose values are converted to bytes at a time."""
HASHED = 1000
"""Number of pictures, evenly spaced, that a fingerprint covers."""
SHAPES = "give (N, H, W) for gray, (N, H, W, C) or (N, C, H, W) with C 1, 3 or 4"


@dataclass(frozen=True)
class Part:
    """Some labeled pictures of a source, which are read when they are needed."""

    labels_B: np.ndarray
    """One number or name per picture."""
    gray: bool
    read: Callable[[np.ndarray], "np.ndarray | list[bytes]"]
    """Indices -> the pictures there: (B, H, W), (B, H, W, C), (B, C, H, W), or picture files."""


@dataclass(frozen=True)
class ArraySource:
    """A dataset of arrays."""

    name: str
    """For messages."""
    parts: Mapping[Split, Part]
    classes: Mapping[int, str] = field(default_factory=dict)
    """The name of each label, if the source has names."""

    @property
    def gray(self) -> bool:
        """Whether all its pictures are gray."""
        return all(part.gray for part in self.parts.values())


class Items(NamedTuple):
    """The pictures of a split: which ones of a part, and their classes."""

    part: Part
    indices_B: np.ndarray
    labels_B: np.ndarray

    def take(self, chosen: Sequence[int]) -> "Items":
        """Return the items at these positions."""
        where = np.asarray(chosen, np.int64)
        return Items(self.part, self.indices_B[where], self.labels_B[where])


def find_classes(source: ArraySource) -> tuple[str, ...]:
    """Return the names of the classes: the source's, or else its training labels, sorted.

    Raises:
        DataError: there is no training part, or it has fewer than 2 classes.
    """
    if "train" not in source.parts:
        raise DataError(f"{source.name}: there are no training images")
    if source.classes:
        return tuple(source.classes.values())
    labels = np.unique(source.parts["train"].labels_B)
    if len(labels) < 2:
        raise DataError(f"{source.name}: a classifier needs at least 2 classes, found "
                        f"{', '.join(map(str, labels)) or 'no label'}")  # fmt: skip
    return tuple(map(str, labels))


def choose_items(
    source: ArraySource, config: DataConfig, classes: Sequence[str] = ()
) -> dict[Split, Items]:
    """Return the items of each split that the settings request; there may be no test split.

    Args:
        source: the dataset.
        config: how many images are held out, and how many are used.
        classes: those of the model that is evaluated. Default: the source's own.

    Raises:
        DataError: a label is not among the classes.
        ConfigError: no image would be left to train on.
    """
    names = tuple(classes) or find_classes(source)
    found = {split: _items(source, split, names) for split in source.parts}
    if set(found) == {"train"}:
        counts = tenth_of_each(_counts(found["train"], names))
        found["train"], found["test"] = _cut(found["train"], counts, "test")
    if "train" in found and "validation" not in found:
        counts = validation_shares(_counts(found["train"], names), config.validation_images)
        found["train"], found["validation"] = _cut(found["train"], counts, "validation")
    wanted = {"train": config.num_train_images, "test": config.num_test_images,
              "validation": config.validation_images}  # fmt: skip
    for split, items in found.items():
        count = wanted[split]
        if count is not None and count < len(items.indices_B):
            _, found[split] = _cut(items, shares(_counts(items, names), count), f"{split} subset")
    return found


def class_counts(source: ArraySource, config: DataConfig) -> list[tuple[str, list[int]]]:
    """Return the number of training, validation and test pictures of each class."""
    names, found = find_classes(source), choose_items(source, config)
    nothing = [0] * len(names)
    columns = [
        _counts(found[split], names) if split in found else nothing for split in get_args(Split)
    ]
    return list(zip(names, map(list, zip(*columns, strict=True)), strict=True))


def _items(source: ArraySource, split: Split, names: Sequence[str]) -> Items:
    """Return all items of a part, with the index of the class of each."""
    labels_B = source.parts[split].labels_B
    values, index_B = np.unique(labels_B, return_inverse=True)
    texts = [source.classes.get(value, str(value)) for value in values.tolist()]
    numbers = {name: number for number, name in enumerate(names)}
    bad = [text for text in texts if text not in numbers]
    if bad:
        known = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(
            f"{source.name}: the label {bad[0]} of the {split} split is not among the "
            f"{len(names)} classes ({known})"
        )
    table = np.array([numbers[text] for text in texts], np.int64)
    return Items(source.parts[split], np.arange(len(labels_B)), table[index_B.reshape(-1)])


def _counts(items: Items, names: Sequence[str]) -> list[int]:
    """Return the number of items of each class."""
    counts: list[int] = np.bincount(items.labels_B, minlength=len(names)).tolist()
    return counts


def _cut(items: Items, counts: Sequence[int], purpose: str) -> tuple[Items, Items]:
    """Return the remaining items, and ``counts`` of each class, chosen by a hash of their index."""
    ranks = [hashlib.sha256(f"{purpose}/{index}".encode()).digest() for index in items.indices_B]
    chosen = choose(items.labels_B.tolist(), counts, ranks)
    rest = np.setdiff1d(np.arange(len(ranks)), chosen)
    return items.take(rest.tolist()), items.take(chosen)


# --- whether the data are still the same ----------------------------------------------------------


def fingerprints(source: ArraySource) -> dict[str, str]:
    """Return a string for each part that changes with its labels and its pictures."""
    return {split: _fingerprint(part) for split, part in source.parts.items()}


def require_same(source: ArraySource, known: Mapping[str, str], splits: Iterable[Split]) -> None:
    """Refuse data whose fingerprints have changed; for splits cut from train, check train.

    Raises:
        DataError: a part of the source that these splits are from has changed.
    """
    parts: set[Split] = {split if split in source.parts else "train" for split in splits}
    found = {part: _fingerprint(source.parts[part]) for part in sorted(parts & set(source.parts))}
    changed = [part for part, text in found.items() if text != known.get(part)]
    if changed:
        raise DataError(
            f"{source.name}: the {' and '.join(changed)} images or labels changed since the run "
            "started: restore them, set --data_path to their new location, or start a new run"
        )


def _fingerprint(part: Part) -> str:
    """Return the number of pictures, and a hash of all labels and HASHED pictures."""
    count = len(part.labels_B)
    digest = hashlib.blake2b("\n".join(map(str, part.labels_B.tolist())).encode(), digest_size=8)
    for picture in part.read(np.unique(np.linspace(0, count - 1, HASHED).astype(np.int64))):
        digest.update(picture if isinstance(picture, bytes) else picture.tobytes())
    return f"{count}-{digest.hexdigest()}"


# --- the pixels -----------------------------------------------------------------------------------


def check_arrays(
    name: str, shape: Sequence[int], labels: np.ndarray, *, kind: np.dtype[np.generic]
) -> tuple[np.ndarray, bool]:
    """Return the labels (N,) and whether the pictures are gray, or refuse other arrays.

    Args:
        name: what to call them in messages.
        shape: that of the array of pictures.
        labels: (N,) or (N, 1), whole numbers or names.
        kind: the type of the pictures' numbers.

    Raises:
        DataError: other shapes or types; the message says which are accepted.
    """
    labels_B = check_labels(name, labels)
    if len(shape) == 2:
        raise DataError(f"{name}: the shape {tuple(shape)} is that of rows of numbers, not "
                        "pictures: reshape it to (N, H, W)")  # fmt: skip
    last, first = (len(shape) == 4 and shape[at] in (1, 3, 4) for at in (3, 1))
    if len(shape) != 3 and last == first:
        both = "which is ambiguous" if last else "which is not that of pictures"
        raise DataError(f"{name}: the shape {tuple(shape)}, {both}: {SHAPES}")
    if 0 in shape:
        raise DataError(f"{name}: no pictures: the shape is {tuple(shape)}")
    if shape[0] != len(labels_B):
        raise DataError(f"{name}: {shape[0]:,} pictures, but {len(labels_B):,} labels")
    if kind.kind not in "biuf":
        raise DataError(f"{name}: pictures of type {kind}: give numbers")
    return labels_B, len(shape) == 3 or shape[3 if last else 1] == 1


def check_labels(name: str, labels: np.ndarray) -> np.ndarray:
    """Return labels as (N,); refuse any but whole numbers or names, one per picture."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise DataError(f"{name}: {labels.shape[1]} labels per picture: give one class per picture")
    labels_B = labels.reshape(-1)
    if labels_B.dtype.kind == "f" and (labels_B == np.rint(labels_B)).all():
        labels_B = labels_B.astype(np.int64)
    if labels_B.dtype.kind not in "iuUb":
        raise DataError(f"{name}: labels of type {labels.dtype}: give whole numbers or names")
    return labels_B


def channels_last(pictures: np.ndarray) -> np.ndarray:
    """Return checked pictures as (B, H, W, C)."""
    if pictures.ndim == 3:
        return pictures[..., None]
    return pictures if pictures.shape[3] in (1, 3, 4) else pictures.transpose(0, 2, 3, 1)


def is_wide(pictures: np.ndarray) -> bool:
    """Return whether the numbers need a range to become bytes."""
    return pictures.dtype != np.uint8 and pictures.dtype != bool


def to_bytes(pictures: np.ndarray, pixel_range: PixelRange | None) -> np.ndarray:
    """Return pictures of any numeric type as uint8; those with alpha are put over white."""
    if pictures.dtype == bool:
        pictures = pictures.astype(np.uint8) * np.uint8(255)
    elif is_wide(pictures):
        assert pixel_range is not None
        raw = np.empty(pictures.shape, np.uint8)
        for start in range(0, len(pictures), BLOCK):
            raw[start : start + BLOCK] = formats.to_bytes(
                pictures[start : start + BLOCK], pixel_range
            )
        pictures = raw
    if pictures.shape[3] == 4:
        alpha = pictures[..., 3:].astype(np.uint16)
        mixed = pictures[..., :3] * alpha + 255 * (255 - alpha)
        pictures = ((mixed + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(pictures)
