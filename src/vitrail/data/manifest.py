"""The data of a run: the classes, every picture file with its split, and the files left out.

    data/CLASS/...                          or      data/train/CLASS/...   data/val/CLASS/...
                                                    data/test/CLASS/...

Split folders are recognized in their usual spellings (Training, training_set, val, valid, seg_test,
train2017, ...), also where an archive repeats a name (training_set/training_set/CLASS). A folder
that looks like splits but cannot be used as such is refused: it is never read as classes.

A manifest is made once, before a run starts, and stored with it as manifest.json. Resuming and
testing use it, so that no picture changes its split when files are added, and files that were
replaced or removed are detected.
"""

import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from vitrail.config.settings import DataConfig, Split
from vitrail.data.formats import is_hidden, is_picture, left_out_reason, walk_files
from vitrail.data.splits import choose, shares, tenth_of_each, validation_shares
from vitrail.errors import CheckpointError, DataError
from vitrail.runtime.files import replace_file

log = logging.getLogger("vitrail")

FILE = "manifest.json"
HASHED_BYTES = 65_536
"""Number of bytes at either end of a file that its fingerprint covers."""
SHOWN = 3
"""Number of files named in a message."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
SPLIT_NAME = re.compile(
    rf"(?:.+[_-])?(?P<split>{'|'.join(SPLIT_WORDS)})"
    r"[\W_]*(?:sets?|data|dataset|images?|imgs?|pictures|photos|split|folder)?[\W_]*\d*",
    re.IGNORECASE,
)

Files = dict[Split, tuple["File", ...]]


class File(NamedTuple):
    """One picture: its path relative to the root, its label, and its fingerprint if computed."""

    path: str
    label: int
    fingerprint: str = ""


@dataclass(frozen=True)
class Manifest:
    """The pictures of a dataset, by split."""

    root: Path
    classes: tuple[str, ...]
    files: Files
    left_out: dict[str, tuple[str, ...]]
    """Names of the files that are not used, by reason."""

    def paths(self, split: Split) -> list[Path]:
        """Return the files of a split."""
        return [self.root / file.path for file in self.files.get(split, ())]

    def without(self, reason: str, names: Iterable[str]) -> "Manifest":
        """Return the manifest without some files, e.g. because they cannot be decoded."""
        dropped = set(names)
        files = {
            split: tuple(file for file in files if file.path not in dropped)
            for split, files in self.files.items()
        }
        left_out = {**self.left_out}
        if dropped:
            left_out[reason] = (*left_out.get(reason, ()), *sorted(dropped))
        return replace(self, files=files, left_out=left_out)

    def limited(self, config: DataConfig) -> "Manifest":
        """Return the manifest with the stratified subsets that the settings request.

        Which pictures are taken depends on their names alone.
        """
        wanted = {
            "train": config.num_train_images,
            "validation": config.validation_images,
            "test": config.num_test_images,
        }
        dropped: list[str] = []
        for split, files in self.files.items():
            count = wanted[split]
            if count is not None and count < len(files):
                counts = shares(_counts(files, len(self.classes)), count)
                rest, _ = _cut(files, counts, f"{split} subset")
                dropped += [file.path for file in rest]
        return self.without("not in the requested subset", dropped)

    def with_fingerprints(self, num_workers: int) -> "Manifest":
        """Return the manifest with the fingerprint of every file."""
        files: Files = {}
        for split in self.files:
            prints = _fingerprints(self.paths(split), num_workers)
            pairs = zip(self.files[split], prints, strict=True)
            files[split] = tuple(file._replace(fingerprint=text) for file, text in pairs)
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
        files: Files = {split: tuple(File(*entry) for entry in content["files"][split])
                        for split in SPLITS if split in content["files"]}  # fmt: skip
        left_out = {reason: tuple(names) for reason, names in content["left_out"].items()}
        manifest = Manifest(Path(content["root"]), tuple(content["classes"]), files, left_out)
        if any(file.label >= len(manifest.classes) for group in files.values() for file in group):
            raise ValueError("a label without a class")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: corrupt: restore it, or start a new run ({error})"
        ) from error
    return manifest


class Layout(NamedTuple):
    """The folder of classes of each split; a single tree is under ``train``, to be split later."""

    trees: dict[Split, Path]
    one_tree: bool
    unused: tuple[Path, ...]
    """Folders next to the split folders, which are not read."""


def find_layout(data_path: Path) -> Layout:
    """Return how a folder of pictures is organized.

    Raises:
        DataError: there is no such folder, or it looks like splits but cannot be used as such.
    """
    if not data_path.is_dir():
        raise DataError(f"{data_path}: no such folder; give --data_path a folder of class folders")
    root = _without_repeat(data_path)
    folders = _subfolders(root)
    matches = [(SPLIT_NAME.fullmatch(folder.name), folder) for folder in folders]
    named = [(SPLIT_WORDS[match["split"].lower()], path) for match, path in matches if match]
    exact = {split for split, path in named if path.name.lower() in SPLIT_WORDS}
    named = [  # train/ is used, old_train/ next to it is not
        (split, path)
        for split, path in named
        if split not in exact or path.name.lower() in SPLIT_WORDS
    ]
    used = {path for _, path in named}
    unused = tuple(path for path in folders if path not in used)
    if len({split for split, _ in named}) < 2:  # a class may be called train
        lone = [path for _, path in named if _subfolders(path) and not _has_pictures(path)]
        if not lone:
            return Layout({"train": root}, one_tree=True, unused=())
        if unused:
            raise DataError(
                f"{root}: {lone[0].name}/ looks like a split, but {unused[0].name}/ next to it "
                f"does not: rename {lone[0].name}/ if it is a class, or move {unused[0].name}/ away"
            )
    trees: dict[Split, Path] = {}
    for split, folder in named:
        if split in trees:
            raise DataError(f"{root}: {trees[split].name}/ and {folder.name}/ are both a {split} "
                            "split: keep one")  # fmt: skip
        trees[split] = folder
    for split, folder in trees.items():
        trees[split] = _without_repeat(folder)
        if not _subfolders(trees[split]):
            raise DataError(
                f"{root}: {folder.name}/ looks like a {split} split, but has no class folders: "
                "put its pictures into one folder per class, or rename it if it is a class"
            )
    return Layout(trees, one_tree=False, unused=unused)


def _without_repeat(folder: Path) -> Path:
    """Return ``folder/folder`` if ``folder`` contains nothing else, as in many archives."""
    inner = _subfolders(folder)
    repeated = len(inner) == 1 and inner[0].name.lower() == folder.resolve().name.lower()
    return inner[0] if repeated and not _has_pictures(folder) else folder


def _subfolders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted by name."""
    try:
        return sorted(p for p in folder.iterdir() if not is_hidden(p.name) and p.is_dir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error


def _has_pictures(folder: Path) -> bool:
    """Return whether there are pictures directly in a folder."""
    return any(map(is_picture, folder.iterdir()))


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
    classes, files, left_out = _list_files(layout, data_path)
    if len(classes) < 2:
        raise DataError(
            f"{layout.trees['train']}: a classifier needs at least 2 class folders with pictures, "
            f"found {len(classes)}"
        )
    if layout.one_tree:
        counts = tenth_of_each(_counts(files["train"], len(classes)))
        files["train"], files["test"] = _cut(files["train"], counts, "test")
    if "validation" not in files:
        counts = validation_shares(_counts(files["train"], len(classes)), validation_images)
        files["train"], files["validation"] = _cut(files["train"], counts, "validation")
    return Manifest(data_path, classes, {s: files.get(s, ()) for s in SPLITS}, left_out)


def scan_whole(data_path: Path, classes: Sequence[str]) -> Manifest:
    """List all pictures of a folder that was not trained on, as the test split.

    A folder of split folders keeps its splits.

    Raises:
        DataError: there is no picture, or a class that ``classes`` lacks.
    """
    layout = find_layout(data_path)
    _, files, left_out = _list_files(layout, data_path, classes)
    if layout.one_tree:
        files = {"test": files["train"]}
    if not any(files.values()):
        raise DataError(f"{data_path}: no class folder with pictures in it")
    return Manifest(data_path, tuple(classes), files, left_out)


def _list_files(
    layout: Layout, data_path: Path, classes: Sequence[str] = ()
) -> tuple[tuple[str, ...], Files, dict[str, tuple[str, ...]]]:
    """Return the classes (default: those of training), the files, and the names left out.

    Raises:
        DataError: a split has an unknown class.
    """
    found: dict[Split, list[tuple[str, str]]] = {}
    left_out: dict[str, list[str]] = {}
    for split, tree in layout.trees.items():
        found[split] = []
        for path in walk_files(tree):
            name, parts = path.relative_to(data_path).as_posix(), path.relative_to(tree).parts
            if not is_picture(path):
                left_out.setdefault(left_out_reason(path), []).append(name)
            elif len(parts) == 1:
                left_out.setdefault("not in a class folder", []).append(name)
            else:
                found[split].append((parts[0], name))
    for folder in layout.unused:
        names = [path.relative_to(data_path).as_posix() for path in walk_files(folder)]
        left_out.setdefault(f"in {folder.name}/, which is not a split", []).extend(names)
    classes = tuple(classes) or tuple(sorted({name for name, _ in found["train"]}))
    labels = {name: label for label, name in enumerate(classes)}
    for split, pairs in found.items():
        unknown = sorted({name for name, _ in pairs} - set(classes))
        if unknown:
            known = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise DataError(f"{layout.trees[split]}: class {unknown[0]!r} is not among the "
                            f"training classes ({known})")  # fmt: skip
    files = {
        split: tuple(
            sorted((File(path, labels[name]) for name, path in pairs), key=lambda file: file.label)
        )
        for split, pairs in found.items()
    }
    return (
        classes,
        files,
        {reason: tuple(sorted(names)) for reason, names in sorted(left_out.items())},
    )


def _counts(files: Iterable[File], n_classes: int) -> list[int]:
    """Return the number of files of each class."""
    counts = Counter(file.label for file in files)
    return [counts[label] for label in range(n_classes)]


def _cut(
    files: Sequence[File], counts: Sequence[int], purpose: str
) -> tuple[tuple[File, ...], tuple[File, ...]]:
    """Return the remaining files, and ``counts`` files of each class, sorted by class and name.

    They are chosen by a hash of their names, the same on every system (some decompose accents).
    """

    def rank(file: File) -> bytes:
        text = f"{purpose}/{unicodedata.normalize('NFC', file.path)}"
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest()  # may not be UTF-8

    files = sorted(files, key=lambda file: (file.label, file.path))
    chosen = set(choose([file.label for file in files], counts, list(map(rank, files))))
    rest = tuple(file for index, file in enumerate(files) if index not in chosen)
    return rest, tuple(files[index] for index in sorted(chosen))


def _fingerprint(path: Path) -> str:
    """Return a string that changes with a file's content; empty if it cannot be read.

    It holds the file's size and a hash of its two ends.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            content = file.read(HASHED_BYTES)
            if size > HASHED_BYTES:
                file.seek(max(HASHED_BYTES, size - HASHED_BYTES))
                content += file.read(HASHED_BYTES)
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
) -> tuple[Manifest, bool]:  # fmt: skip
    """Return the pictures to evaluate a model on, and whether it was trained on their folder.

    For the folder that it was trained on, or a copy of it, that is the ``known`` manifest of its
    run; without one (a file of weights), the folder is split again. For any other folder, all
    pictures are used.

    Raises:
        DataError: the folder of the run has changed, or does not have the model's classes.
    """
    same = data.data_path.resolve() == (known.root if known else trained.data_path).resolve()
    if known is None:
        if trained.dataset == "folder" and same:
            return scan(data.data_path, data.validation_images), True
        return scan_whole(data.data_path, classes), False
    here = replace(known, root=data.data_path)
    if same or all(path.is_file() for split in SPLITS for path in here.paths(split)):
        verify(here, [split], data.num_workers)
        return here, True
    whole = scan_whole(data.data_path, classes)
    learned = {file.fingerprint for file in known.files.get("train", ())}
    found = _fingerprints(whole.paths(split), data.num_workers)
    overlap = sum(bool(text) and text in learned for text in found)
    if overlap:
        log.warning("%s: the model was trained on %d of these %d pictures (equal content)",
                    data.data_path, overlap, len(found))  # fmt: skip
    return whole, False


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


def count_files(manifest: Manifest) -> list[tuple[str, list[int]]]:
    """Return the number of training, validation and test pictures of each class."""
    n_classes = len(manifest.classes)
    columns = [_counts(manifest.files.get(split, ()), n_classes) for split in SPLITS]
    return list(zip(manifest.classes, map(list, zip(*columns, strict=True)), strict=True))
