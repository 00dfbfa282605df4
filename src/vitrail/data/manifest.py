"""The data of a run: the classes, every picture file with its split, and the files left out.

A manifest is made once, before a run starts, and stored with it as manifest.json. Resuming and
testing use it, so that no picture changes its split when files are added, and files that were
replaced or removed are detected.
"""

import hashlib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.config.settings import DataConfig, Split
from vitrail.data.layout import Layout, find_layout, is_picture, left_out_reason, walk_files
from vitrail.data.splits import cut, shares, tenth_of_each, validation_shares
from vitrail.errors import CheckpointError, DataError
from vitrail.runtime.files import replace_file

log = logging.getLogger("vitrail")

FILE = "manifest.json"
HASHED = 65_536
"""Number of bytes at either end of a file that its fingerprint covers."""
SHOWN = 3
"""Number of files named in a message."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Files = dict[Split, tuple["File", ...]]


class File(NamedTuple):
    """One picture: its path relative to the root, its label, and its fingerprint if computed."""

    path: str
    label: int
    fingerprint: str = ""


@dataclass(frozen=True)
class Manifest:
    """The pictures of a data set, by split."""

    root: Path
    classes: tuple[str, ...]
    files: Files
    left_out: dict[str, tuple[str, ...]]
    """Names of the files that are not used, by reason."""

    def paths(self, split: Split) -> list[Path]:
        """Return the files of a split."""
        return [self.root / file.path for file in self.files.get(split, ())]

    def labels(self, split: Split) -> list[int]:
        """Return the labels of a split."""
        return [file.label for file in self.files.get(split, ())]

    def without(self, reason: str, paths: Iterable[Path]) -> "Manifest":
        """Return the manifest without some files, e.g. because they cannot be decoded."""
        names = {path.relative_to(self.root).as_posix() for path in paths}
        files = {
            split: tuple(file for file in files if file.path not in names)
            for split, files in self.files.items()
        }
        earlier = self.left_out.get(reason, ())
        reasons = {**self.left_out, reason: (*earlier, *sorted(names))} if names else self.left_out
        return replace(self, files=files, left_out=reasons)

    def limited(self, config: DataConfig) -> "Manifest":
        """Return the manifest with the stratified subsets that the settings request.

        Which pictures are taken depends on their names alone.
        """
        wanted = {
            "train": config.num_train_images,
            "validation": config.validation_images,
            "test": config.num_test_images,
        }
        dropped: list[Path] = []
        for split, files in self.files.items():
            kept = {f.path for f in _subset(files, wanted[split], len(self.classes), split)}
            dropped += [self.root / file.path for file in files if file.path not in kept]
        return self.without("not in the requested subset", dropped)

    def with_fingerprints(self, num_workers: int) -> "Manifest":
        """Return the manifest with the fingerprint of every file."""
        prints = {s: _fingerprints(self.paths(s), num_workers) for s in self.files}
        files = {
            split: tuple(
                file._replace(fingerprint=p) for file, p in zip(files, prints[split], strict=True)
            )
            for split, files in self.files.items()
        }
        return replace(self, files=files)

    def save(self, folder: Path) -> None:
        """Write manifest.json into a run folder."""
        content = {
            "root": str(self.root.absolute()),
            "classes": self.classes,
            "files": self.files,
            "left_out": self.left_out,
        }
        replace_file(folder / FILE, (json.dumps(content, indent=0) + "\n").encode())


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run folder.

    Raises:
        CheckpointError: it is missing or corrupt.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _from_json(content)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: corrupt: restore it, or start a new run ({error})"
        ) from error


def _from_json(content: Any) -> Manifest:
    """Return the manifest that ``Manifest.save`` wrote, after checking it."""
    classes = tuple(map(_text, content["classes"]))
    files: Files = {}
    for split, entries in content["files"].items():
        if split not in SPLITS:
            raise ValueError(f"split {split!r:.40}")
        files[split] = tuple(File(_text(p), int(y), _text(f)) for p, y, f in entries)
        if not all(0 <= file.label < len(classes) for file in files[split]):
            raise ValueError("a label without a class")
        if any(Path(file.path).is_absolute() or ".." in file.path for file in files[split]):
            raise ValueError("a file outside of the data's folder")
    left_out = {_text(r): tuple(map(_text, names)) for r, names in content["left_out"].items()}
    return Manifest(Path(_text(content["root"])), classes, files, left_out)


def _text(value: object) -> str:
    """Return a value that must be a string."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not a string")
    return value


def scan(data_path: Path, validation_images: int | None = None) -> Manifest:
    """List the pictures of a folder and assign each to a split.

    A single tree of classes is split: a fixed tenth of each class (at least one picture, if it has
    two) for test, then a tenth of the rest, or ``validation_images`` in all, for validation. The
    pictures whose relative names have the lowest hashes are taken, so that the splits depend
    neither on the machine nor on the order of its directories.

    Raises:
        DataError: there is nothing to train on, or a split has a class that training lacks.
        ConfigError: more validation images are requested than there are.
    """
    layout = find_layout(data_path)
    if "train" not in layout.trees:
        there = ", ".join(f"{folder.name}/" for folder in layout.trees.values())
        raise DataError(f"{data_path}: found {there}, but no train/ next to it: add it")
    trees, left_out = _list_trees(layout, data_path)
    names = tuple(sorted(trees["train"]))
    if len(names) < 2:
        raise DataError(
            f"{layout.trees['train']}: a classifier needs at least 2 class folders with pictures, "
            f"found {len(names)}"
        )
    _check_classes(trees, layout, names)
    by_class = {split: [tree.get(name, []) for name in names] for split, tree in trees.items()}
    if layout.one_tree:
        train = by_class["train"]
        by_class["train"], by_class["test"] = cut(
            train, tenth_of_each(list(map(len, train))), _name_rank("test")
        )
    if "validation" not in by_class:
        train = by_class["train"]
        counts = validation_shares(list(map(len, train)), validation_images)
        by_class["train"], by_class["validation"] = cut(train, counts, _name_rank("validation"))
    by_class.setdefault("test", [])
    files: Files = {split: _labeled(by_class[split]) for split in SPLITS}
    return Manifest(data_path, names, files, left_out)


def scan_whole(data_path: Path, classes: Sequence[str]) -> Manifest:
    """List all pictures of a folder that was not trained on, as the test split.

    A folder of split folders keeps its splits.

    Raises:
        DataError: there is no picture, or a class that ``classes`` lacks.
    """
    layout = find_layout(data_path)
    trees, left_out = _list_trees(layout, data_path)
    _check_classes(trees, layout, classes)
    if layout.one_tree:
        trees = {"test": trees["train"]}
    files = {s: _labeled([tree.get(name, []) for name in classes]) for s, tree in trees.items()}
    if not any(files.values()):
        raise DataError(f"{data_path}: no class folder with pictures in it")
    return Manifest(data_path, tuple(classes), files, left_out)


def _list_trees(
    layout: Layout, data_path: Path
) -> tuple[dict[Split, dict[str, list[str]]], dict[str, tuple[str, ...]]]:
    """Return the relative names of the pictures by split and class, and of the files left out."""
    trees: dict[Split, dict[str, list[str]]] = {}
    left_out: dict[str, list[str]] = {}
    for split, tree in layout.trees.items():
        trees[split] = {}
        for path in walk_files(tree):
            name, parts = path.relative_to(data_path).as_posix(), path.relative_to(tree).parts
            if not is_picture(path):
                left_out.setdefault(left_out_reason(path), []).append(name)
            elif len(parts) == 1:
                left_out.setdefault("not in a class folder", []).append(name)
            else:
                trees[split].setdefault(parts[0], []).append(name)
    for folder in layout.unused:
        names = [path.relative_to(data_path).as_posix() for path in walk_files(folder)]
        left_out.setdefault(f"in {folder.name}/, which is no split", []).extend(names)
    return trees, {reason: tuple(sorted(names)) for reason, names in sorted(left_out.items())}


def _check_classes(
    trees: dict[Split, dict[str, list[str]]], layout: Layout, classes: Sequence[str]
) -> None:
    """Refuse a split with an unknown class."""
    for split, tree in trees.items():
        unknown = sorted(set(tree) - set(classes))
        if unknown:
            known = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise DataError(f"{layout.trees[split]}: class {unknown[0]!r} is not among the "
                            f"training classes ({known})")  # fmt: skip


def _subset(
    files: tuple[File, ...], wanted: int | None, n_classes: int, purpose: str
) -> tuple[File, ...]:
    """Return a stratified subset of ``wanted`` files, or all of them."""
    if wanted is None or wanted >= len(files):
        return files
    by_class: list[list[str]] = [[] for _ in range(n_classes)]
    for file in files:
        by_class[file.label].append(file.path)
    counts = shares(list(map(len, by_class)), wanted)
    _, chosen = cut(by_class, counts, _name_rank(f"{purpose} subset"))
    kept = {name for names in chosen for name in names}
    return tuple(file for file in files if file.path in kept)


def _labeled(by_class: Sequence[Sequence[str]]) -> tuple[File, ...]:
    """Return the files of all classes with their labels."""
    return tuple(File(name, label) for label, names in enumerate(by_class) for name in names)


def _name_rank(purpose: str) -> Callable[[str], bytes]:
    """Return a hash of relative names, the same on every system (some decompose accents)."""

    def rank(name: str) -> bytes:
        text = f"{purpose}/{unicodedata.normalize('NFC', name)}"
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest()  # may not be UTF-8

    return rank


def _fingerprint(path: Path) -> str:
    """Return a string that changes with a file's content; empty if it cannot be read.

    It holds the file's size and a hash of its two ends.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            content = file.read(HASHED)
            if size > HASHED:
                file.seek(max(HASHED, size - HASHED))
                content += file.read(HASHED)
    except OSError:
        return ""
    return f"{size}-{hashlib.blake2b(content, digest_size=8).hexdigest()}"


def _fingerprints(paths: Sequence[Path], num_workers: int) -> list[str]:
    """Return the fingerprint of every file."""
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        return list(pool.map(_fingerprint, paths))


def verify(manifest: Manifest, splits: Iterable[Split], num_workers: int) -> None:
    """Refuse a folder whose files changed since the manifest was made.

    Raises:
        DataError: files are missing or were replaced; some are named.
    """
    missing: list[str] = []
    replaced: list[str] = []
    for split in splits:
        now = _fingerprints(manifest.paths(split), num_workers)
        for file, found in zip(manifest.files.get(split, ()), now, strict=True):
            if found != file.fingerprint:
                (replaced if found else missing).append(file.path)
    changes = [
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in (("missing", missing), ("replaced", replaced))
        if names
    ]
    if changes:
        raise DataError(
            f"{manifest.root}: the files changed since the run started: {', '.join(changes)}: "
            "restore them, set --data_path to their new location, or start a new run"
        )


def choose_manifest(
    data: DataConfig, trained: DataConfig, known: Manifest | None, split: Split,
    classes: Sequence[str],
) -> Manifest:  # fmt: skip
    """Return the pictures to evaluate a trained model on.

    For the folder that it was trained on, or a copy of it, that is the run's manifest; without one
    (a file of weights), the folder is split again. Of any other folder, all pictures are used.

    Args:
        data: the settings with the folder to evaluate on.
        trained: the settings of the model's training.
        known: the manifest of the model's run.
        split: the split to evaluate on.
        classes: the model's classes.

    Raises:
        DataError: the folder of the run has changed, or does not have the model's classes.
    """
    if known is None:
        if trained.dataset == "folder" and _is_same(data.data_path, trained.data_path):
            return scan(data.data_path, data.validation_images)
        return scan_whole(data.data_path, classes)
    here = replace(known, root=data.data_path)
    complete = all(path.is_file() for s in SPLITS for path in here.paths(s))
    if _is_same(data.data_path, known.root) or complete:
        verify(here, [split], data.num_workers)
        return here
    whole = scan_whole(data.data_path, classes)
    learned = {file.fingerprint for file in known.files.get("train", ())}
    found = _fingerprints(whole.paths(split), data.num_workers)
    overlap = sum(bool(text) and text in learned for text in found)
    if overlap:
        log.warning("%s: the model was trained on %d of these %d pictures (equal content)",
                    data.data_path, overlap, len(found))  # fmt: skip
    return whole


def _is_same(path: Path, other: Path) -> bool:
    """Return whether two paths are the same folder."""
    return path.resolve() == other.resolve()


def count_added(manifest: Manifest) -> int:
    """Return how many pictures of the folder are not in the manifest."""
    known = {file.path for files in manifest.files.values() for file in files}
    known.update(name for names in manifest.left_out.values() for name in names)
    found = (path.relative_to(manifest.root).as_posix() for path in walk_files(manifest.root)
             if is_picture(path))  # fmt: skip
    return sum(name not in known for name in found)


def summary(manifest: Manifest) -> str:
    """Return one line that counts the files left out by reason; empty if there are none."""
    counted = [f"{len(names)} {reason}" for reason, names in manifest.left_out.items()]
    return f"left out: {', '.join(counted)}" if counted else ""


def class_counts(manifest: Manifest) -> list[tuple[str, list[int]]]:
    """Return the number of training, validation and test pictures of each class."""
    counts = [Counter(manifest.labels(split)) for split in SPLITS]
    return [(name, [c[label] for c in counts]) for label, name in enumerate(manifest.classes)]
