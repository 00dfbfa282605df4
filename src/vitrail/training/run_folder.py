"""The files of a run: their layout, the lock, the data, metrics, uses of the test split.

output/NAME/
├── config.json  env.json          settings; software and hardware
├── manifest.json                  for a folder of pictures: every file with its split
├── data.json                      for arrays: the fingerprint of each part
├── data.npz                       from vitrail.train: the arrays, unless a path was given
├── metrics.jsonl                  one line per epoch
├── result.json                    at the end: validation and test scores, seconds, parameters
├── test_uses.jsonl                one line for each use of the test split
├── graph_loss.png  graph_accuracy.png  confusion_matrix.png  calibration.png
├── checkpoints/                   LAST, BEST and the folders they name: see checkpoint.py
├── attention/                     with --attention_epochs: a picture every N epochs
├── trackers.json                  with --wandb or --mlflow: this run's ids in them
└── tensorboard/                   with --tensorboard
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, get_args

from filelock import BaseFileLock, FileLock, Timeout

from vitrail.config.settings import ARRAYS, Config, DataConfig, Split
from vitrail.data.arrays import choose_items, fingerprints, require_same
from vitrail.data.datasets import Loaded, load_data
from vitrail.data.hf import is_on_hub
from vitrail.data.images import ImageSet
from vitrail.data.manifest import (
    FILE,
    Manifest,
    choose_manifest,
    count_added,
    load_manifest,
    scan,
    verify,
)
from vitrail.data.sources import open_source
from vitrail.errors import CheckpointError, ConfigError, OutputError
from vitrail.runtime import distributed
from vitrail.runtime.files import replace_file, write_json
from vitrail.weights.checkpoint import read_bytes, read_json_object

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier

DATA = "data.npz"
"""The arrays passed to a run from Python."""
FINGERPRINTS = "data.json"
ALL_IMAGES = dict.fromkeys(("num_train_images", "validation_images", "num_test_images"))
"""The settings of subsets, at their defaults."""
LOCK = ".lock"
"""A file that the writing process locks; the system unlocks it when the process ends."""


class EpochRow(TypedDict):
    """One line of metrics.jsonl. ``seconds`` is the training time since the run began."""

    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    seconds: float
    images_per_second: float
    validation_accuracy: NotRequired[float]
    validation_loss: NotRequired[float]
    test_accuracy: NotRequired[float]
    test_loss: NotRequired[float]
    evaluation_seconds: float


# --- new folders ----------------------------------------------------------------------------------


def new_folder(output_path: Path, folder_name: str, default_name: str) -> Path:
    """Create the folder of a new run: ``folder_name``, or the default name with a number.

    An existing folder of that name is accepted if it is empty, as after a kill at the start.

    Raises:
        ConfigError: ``folder_name`` is taken.
        OutputError: the folder cannot be created.
    """
    folder, number = output_path / (folder_name or default_name), 1
    try:
        output_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output_path}: cannot be created: {error.strerror}") from error
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            if folder_name:
                require_unused(folder)
                return folder
        except OSError as error:
            raise OutputError(f"{folder}: cannot be created: {error.strerror}") from error
        else:
            return folder
        number += 1
        folder = output_path / f"{default_name}-{number}"


def require_unused(folder: Path) -> None:
    """Raise ConfigError if a folder is not empty."""
    if folder.exists() and not is_unused(folder):
        raise ConfigError(
            f"{folder} already exists: give another --folder_name, or resume the run in it with "
            f"--resume {folder}"
        )


def is_unused(path: Path) -> bool:
    """Return whether a folder is empty except for what a run that never began leaves behind."""
    return path.is_dir() and all(
        entry.name in (LOCK, DATA) or entry.name.startswith(".partial-") for entry in path.iterdir()
    )


def is_run_folder(path: Path) -> bool:
    """Return whether a path is a run folder with checkpoints."""
    return (path / "checkpoints").is_dir()


def require_run_folder(folder: Path) -> None:
    """Raise CheckpointError if a folder has neither settings nor checkpoints."""
    if not ((folder / "config.json").is_file() or is_run_folder(folder)):
        raise CheckpointError(f"{folder}: not a run folder (it has no checkpoints/)")


# --- the lock -------------------------------------------------------------------------------------


def hold(folder: Path) -> AbstractContextManager[object]:
    """Lock a run folder against other processes until the result is released or garbage-collected.

    A process may hold a folder several times, e.g. when a notebook resumes its own run. With
    several ranks, rank 0 holds it.

    Raises:
        OutputError: another process holds it, or the folder cannot be written.
    """
    return distributed.each(_acquire, folder)


def _acquire(folder: Path) -> AbstractContextManager[object]:
    if not distributed.is_leader():
        return contextlib.nullcontext()
    try:
        return lock_of(folder).acquire()
    except Timeout:
        raise OutputError(
            f"{folder}: in use by another run: wait for it to finish, or give another --folder_name"
        ) from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error


def release(folder: Path) -> None:
    """Unlock a folder, however many times this process holds it."""
    lock_of(folder).release(force=True)


def lock_of(folder: Path) -> BaseFileLock:
    """Return the lock of a run folder, one object for the whole process."""
    return FileLock(folder / LOCK, timeout=0, is_singleton=True, thread_local=False)


# --- the data -------------------------------------------------------------------------------------


def _run_of(source: str) -> Path | None:
    """Return the run folder that a model was loaded from, directly or as one of its checkpoints."""
    checkpoints = Path(source).resolve().parent
    if is_run_folder(Path(source)):
        return Path(source)
    return checkpoints.parent if checkpoints.name == "checkpoints" else None


def load_split(classifier: "Classifier", split: Split, **changes: Any) -> ImageSet:
    """Load a split of the data that a model was trained on, or of other data.

    If the model comes from a run, the run's manifest determines the splits, and arrays must be
    those of the run. Any other folder is a test split as a whole. ``changes`` are data settings
    that differ, such as ``data_path``.

    Raises:
        DataError: data are missing, or changed since the training.
    """
    config = classifier.config
    if changes.get("dataset", "shapes") != "shapes":
        changes["shortcut"] = 0.0
    run = _run_of(classifier.source)
    data = locate_arrays(config.data, run) if run else config.data
    data = dataclasses.replace(data, **changes)
    manifest = None
    if run and data.dataset in ARRAYS and "data_path" not in changes:
        _verify_arrays(data, run, [split])
    if data.dataset == "folder":
        known = load_manifest(run) if run and (run / FILE).is_file() else None
        manifest, trained = choose_manifest(data, config.data, known, split, classifier.classes)
        if not trained:  # the subsets of the training do not apply to it
            data = dataclasses.replace(data, **{**ALL_IMAGES, **changes})
    changed = dataclasses.replace(config, data=data)
    return _load(changed, manifest, split, classes=classifier.classes).images[split]


def load_on_all_ranks(config: Config, manifest: Manifest | None, *splits: Split) -> Loaded:
    """Load splits on every rank; where a download may be needed, on one rank per machine first."""
    downloads = config.data.dataset.startswith(("cifar", "hf"))
    on_ranks = distributed.first_on_machine if downloads else distributed.each
    return on_ranks(_load, config, manifest, *splits)


def _load(
    config: Config, manifest: Manifest | None, *splits: Split, classes: Sequence[str] = ()
) -> Loaded:
    size, channels = config.model.image_hw, config.model.n_channels
    return load_data(
        config.data, splits, image_hw=size, n_channels=channels, manifest=manifest, classes=classes
    )


def write_fingerprints(config: Config, folder: Path) -> None:
    """Write data.json into the folder of a run on arrays."""
    if config.data.dataset in ARRAYS:
        write_json(folder / FINGERPRINTS, fingerprints(open_source(config.data)))


def locate_arrays(data: DataConfig, folder: Path) -> DataConfig:
    """Return the settings, with the path of the arrays corrected if the run folder was moved."""
    kept = (folder / DATA).absolute()
    moved = data.data_path.name == DATA and not data.data_path.exists() and kept.exists()
    return dataclasses.replace(data, data_path=kept) if moved else data


def with_absolute_path(config: Config) -> Config:
    """Return the settings with an absolute data_path: a run can be tested from any folder."""
    if config.data.dataset == "shapes" or is_on_hub(config.data.data_path):
        return config
    data = dataclasses.replace(config.data, data_path=config.data.data_path.absolute())
    return dataclasses.replace(config, data=data)


def _verify_arrays(data: DataConfig, folder: Path, splits: Sequence[Split]) -> None:
    """Refuse arrays that differ from the run's, if it recorded their fingerprints."""
    path = folder / FINGERPRINTS
    if path.is_file():
        require_same(open_source(data), read_json_object(path), splits)


def has_test(config: Config, manifest: Manifest | None) -> bool:
    """Return whether the dataset has a test split."""
    if config.data.dataset in ARRAYS:
        return "test" in choose_items(open_source(config.data), config.data)
    return manifest is None or bool(manifest.files.get("test"))


def list_files(config: Config, manifest: Manifest | None) -> Manifest | None:
    """Return the files of a new run, with fingerprints; None if its dataset is not a folder."""
    if config.data.dataset != "folder":
        return None
    listed = manifest or scan(config.data.data_path, config.data.validation_images)
    return listed.with_fingerprints(config.data.num_workers)


def restore_files(config: Config, folder: Path) -> tuple[Manifest | None, int]:
    """Return the files that a run started with, after verifying them, and how many were added."""
    if config.data.dataset in ARRAYS:
        _verify_arrays(config.data, folder, get_args(Split))
    if config.data.dataset != "folder" or not (folder / FILE).is_file():
        return list_files(config, None), 0  # it was stopped before its settings were written
    manifest = dataclasses.replace(load_manifest(folder), root=config.data.data_path)
    verify(manifest, manifest.files, config.data.num_workers)
    return manifest, count_added(manifest)


# --- metrics.jsonl and test_uses.jsonl ------------------------------------------------------------


def read_rows(folder: Path) -> list[EpochRow]:
    """Return the lines of metrics.jsonl, if there are any.

    Raises:
        CheckpointError: a line does not describe an epoch.
    """
    path = folder / "metrics.jsonl"
    try:
        rows = list(map(json.loads, read_bytes(path).splitlines())) if path.exists() else []
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: corrupt: {error}") from error
    if not all(
        isinstance(row, dict)
        and {"epoch", "step"} <= row.keys()
        and all(value is None or isinstance(value, int | float) for value in row.values())
        for row in rows
    ):
        raise CheckpointError(f"{path}: corrupt: a line does not describe an epoch")
    return rows


def log_test_use(folder: Path, purpose: str, images: int) -> None:
    """Append a use of the test split, with its time and purpose, to test_uses.jsonl."""
    path = folder / "test_uses.jsonl"
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "purpose": purpose, "images": images}
    try:
        earlier = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
    lines = [*earlier.splitlines(), json.dumps(row, ensure_ascii=False).encode()]
    replace_file(path, b"\n".join(lines) + b"\n")


def log_test_use_of(source: str, fallback: Path, purpose: str, images: int) -> str:
    """Log a use of the test split in the run folder that a model was loaded from.

    If it is not from a run, or the run is read-only, log it in the folder ``fallback``. Return a
    message for the user if the run folder could not be written, else "".
    """
    run = _run_of(source)
    try:
        log_test_use(run or fallback, purpose, images)
    except OutputError as error:
        if run is None:
            raise
        log_test_use(fallback, purpose, images)
        log = fallback / "test_uses.jsonl"
        return f"{error}; this use of the test split is logged in {log} instead"
    return ""
