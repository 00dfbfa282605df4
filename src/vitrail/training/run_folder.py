"""The files of a run: their layout, the lock, pruning, and recovery after a crash.

output/NAME/
├── config.json  env.json          settings; software and hardware
├── manifest.json                  for a folder of pictures: every file with its split
├── metrics.jsonl                  one line per epoch
├── result.json                    at the end: validation and test scores, seconds, parameters
├── test_uses.jsonl                one line for each use of the test split
├── graph_loss.png  graph_accuracy.png  confusion_matrix.png  calibration.png
├── checkpoints/                   LAST, BEST and the folders they name: see checkpoint.py
├── attention/                     with --attention_epochs: a picture every N epochs
├── trackers.json                  with --wandb or --mlflow: the ids of this run there
└── tensorboard/                   with --tensorboard

A run may be killed between any two writes. ``recover`` then removes what is incomplete, restores
what was moved aside, and makes LAST and BEST name the right checkpoints.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from filelock import BaseFileLock, FileLock, Timeout
from torch import Tensor

from vitrail.config.files import RESUME_OVERRIDES
from vitrail.config.settings import Config
from vitrail.errors import CheckpointError, ConfigError, OutputError
from vitrail.runtime import distributed
from vitrail.runtime.files import replace_file
from vitrail.weights.checkpoint import (
    CheckpointInfo,
    load_info,
    load_training,
    load_weights,
    read_pointer,
    remove_folders,
    step_of,
    write_pointer,
)

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

    An existing folder of that name is accepted if it is empty, as after an immediate kill.

    Raises:
        ConfigError: ``folder_name`` is taken.
        OutputError: the folder cannot be created.
    """
    numbered = (f"{default_name}-{number}" for number in range(2, 100_000))
    for name in [folder_name] if folder_name else [default_name, *numbered]:
        try:
            (output_path / name).mkdir(parents=True)
        except FileExistsError:
            if folder_name:
                require_unused(output_path / name)
                return output_path / name
        except OSError as error:
            raise OutputError(
                f"{output_path / name}: cannot be created: {error.strerror}"
            ) from error
        else:
            return output_path / name
    raise OutputError(f"{output_path}: too many runs named {default_name}: give --folder_name")


def require_unused(folder: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        ConfigError: it holds a run, or other files.
    """
    if folder.exists() and not is_unused(folder):
        raise ConfigError(
            f"{folder} already exists: give another --folder_name, or resume the run in it with "
            f"--resume {folder}"
        )


def is_unused(path: Path) -> bool:
    """Return whether a folder is empty except for what a run that never began leaves."""
    return path.is_dir() and all(
        entry.name == LOCK or entry.name.startswith(".partial-") for entry in path.iterdir()
    )


def is_run_folder(path: Path) -> bool:
    """Return whether a path is a run folder with checkpoints."""
    return (path / "checkpoints").is_dir()


def require_run_folder(folder: Path) -> None:
    """Refuse a folder without a run. Nothing is written.

    Raises:
        CheckpointError: it has neither settings nor checkpoints.
    """
    if not ((folder / "config.json").is_file() or is_run_folder(folder)):
        raise CheckpointError(f"{folder}: not a run folder (it has no checkpoints/)")


# --- the lock -------------------------------------------------------------------------------------


def hold(folder: Path) -> AbstractContextManager[object]:
    """Lock a run folder against other processes until the result is released or collected.

    A process may hold a folder several times, e.g. when a notebook resumes its own run. With
    several ranks, rank 0 holds it.

    Raises:
        OutputError: another process holds it, or the folder cannot be written.
    """
    return distributed.each(
        lambda: _acquire(folder) if distributed.is_leader() else contextlib.nullcontext()
    )


def _acquire(folder: Path) -> AbstractContextManager[object]:
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


# --- metrics.jsonl and test_uses.jsonl ------------------------------------------------------------


def read_rows(folder: Path) -> list[EpochRow]:
    """Return the lines of metrics.jsonl, if there are any.

    Raises:
        CheckpointError: the file cannot be read, or a line is not one of a run.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: corrupt: {error}") from error
    if not all(map(_is_row, rows)):
        raise CheckpointError(f"{path}: corrupt: a line is not an epoch of a run")
    return rows


def _is_row(row: Any) -> bool:
    """Return whether a value is an object of numbers that has an epoch and a step."""
    return (
        isinstance(row, dict)
        and all(value is None or _is_number(value) for value in row.values())
        and all(type(row.get(name)) is int for name in ("step", "epoch"))
    )


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that can be printed and plotted."""
    return isinstance(value, int | float) and -1e15 < value < 1e15


def quality(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Return a sort key for epochs, the best one highest: accuracy, then loss, then the first.

    Without validation the newest epoch is the best. Before any epoch stands a checkpoint inside
    one, of which only the step is known.
    """
    if "validation_accuracy" in row:
        return 1, row["validation_accuracy"], -row["validation_loss"], -row["step"]
    return (1 if "epoch" in row else 0), 0, 0, row.get("step", 0)


def log_test_use(folder: Path, purpose: str, images: int) -> None:
    """Append a use of the test split, with its time and purpose, to test_uses.jsonl."""
    path = folder / "test_uses.jsonl"
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "purpose": purpose, "images": images}
    try:
        earlier = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from error
    if earlier and not earlier.endswith(b"\n"):
        earlier += b"\n"
    replace_file(path, earlier + json.dumps(row, ensure_ascii=False).encode() + b"\n")


def log_test_use_of(source: str, fallback: Path, purpose: str, images: int) -> str:
    """Log a use of the test split in the run folder that a model came from.

    Args:
        source: where the model was loaded from (``Classifier.source``): a run folder, one of its
            checkpoints, or anything else.
        fallback: the folder to log in if the model is not from a run, or the run is read-only.
        purpose: what the images were used for.
        images: number of images.

    Returns:
        a message for the user if the run folder could not be written, else "".

    Raises:
        OutputError: the fallback folder cannot be written either.
    """
    path = Path(source)
    checkpoints = path.resolve().parent
    if is_run_folder(path):
        run = path
    elif checkpoints.name == "checkpoints":
        run = checkpoints.parent
    else:
        log_test_use(fallback, purpose, images)
        return ""
    try:
        log_test_use(run, purpose, images)
    except OutputError as error:
        log_test_use(fallback, purpose, images)
        log = fallback / "test_uses.jsonl"
        return f"{error}; this use of the test split is logged in {log} instead"
    return ""


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint_folders(checkpoints: Path, last: int | None = None) -> list[Path]:
    """Return the checkpoint folders in the order of their steps. Default: all, else to ``last``."""
    steps = {folder: step_of(folder) for folder in checkpoints.glob("step-*")}
    known = {folder: step for folder, step in steps.items() if step is not None}
    wanted = [folder for folder, step in known.items() if last is None or step <= last]
    return sorted(wanted, key=known.__getitem__)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove the checkpoints up to LAST, except BEST and the ``keep`` newest (0 keeps all).

    Those after LAST were skipped as corrupt; training will overwrite them.

    Raises:
        OutputError: a checkpoint cannot be removed.
    """
    newest, best = (read_pointer(checkpoints, name) for name in ("LAST", "BEST"))
    folders = checkpoint_folders(checkpoints, last=step_of(newest))
    try:
        for folder in set(folders) - {*folders[-keep:], newest, best}:
            # Renamed first, so that a kill during removal leaves nothing that looks complete.
            doomed = folder.with_name(f".doomed-{folder.name}")
            folder.rename(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise OutputError(f"{checkpoints}: cannot be pruned: {error.strerror}") from error


class SavedState(NamedTuple):
    """A checkpoint in memory, and notices about others that were skipped."""

    folder: Path
    info: CheckpointInfo
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    best: Mapping[str, Any]
    """The row of the checkpoint that BEST names; only its step before the first epoch."""
    notices: list[str]


def recover(folder: Path, config: Config) -> SavedState | None:
    """Repair a run folder and load its newest valid checkpoint.

    Returns:
        None if the run was stopped before its first checkpoint.

    Raises:
        CheckpointError: it is not a run folder, it has no valid checkpoint, or the checkpoint was
            made with other settings.
        OutputError: the folder cannot be written.
    """
    require_run_folder(folder)
    checkpoints = folder / "checkpoints"
    remove_incomplete(checkpoints)
    if (folder / "config.json").is_file() and not checkpoint_folders(checkpoints):
        return None
    saved = newest_valid(checkpoints)
    _require_same_settings(config, saved)
    write_pointer(checkpoints, "LAST", saved.folder)
    return _repair_best(checkpoints, saved)


def remove_incomplete(checkpoints: Path) -> None:
    """Remove what a killed run left incomplete; restore what it had moved aside.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        for old in checkpoints.glob(".old-*"):
            folder = old.with_name(old.name.removeprefix(".old-"))
            if not folder.exists():
                old.rename(folder)
        for path in checkpoints.glob(".*"):
            if re.match(r"\.(old|partial|doomed)-", path.name):
                path.unlink() if path.is_file() else remove_folders(path)
    except OSError as error:
        raise OutputError(f"{checkpoints}: cannot be written: {error.strerror}") from error


def newest_valid(checkpoints: Path) -> SavedState:
    """Load the newest checkpoint that is complete and unchanged.

    Raises:
        CheckpointError: there is none.
    """
    skipped: list[str] = []
    for folder in reversed(checkpoint_folders(checkpoints)):
        try:
            state = (load_info(folder), load_weights(folder), load_training(folder))
        except CheckpointError as error:
            skipped.append(f"skipped a corrupt checkpoint: {error}")
        else:
            return SavedState(folder, *state, {}, skipped)
    reason = skipped[0] if skipped else "the run was stopped before its first one"
    raise CheckpointError(f"{checkpoints}: no valid checkpoint to resume from: {reason}")


def _require_same_settings(config: Config, saved: SavedState) -> None:
    """Refuse to resume with other settings than those of the checkpoint."""
    asked, made = config.flat(), saved.info.config.flat()
    other = [name for name in made if name not in RESUME_OVERRIDES and asked[name] != made[name]]
    other = [name for name in other if (name, asked[name]) != ("n_classes", 0)]
    if other:
        listed = ", ".join(f"{name} {asked[name]!r} (not {made[name]!r})" for name in other)
        raise CheckpointError(
            f"{saved.folder}: its settings do not match config.json: {listed:.200}: restore "
            "config.json, or start a new run"
        )


def _repair_best(checkpoints: Path, saved: SavedState) -> SavedState:
    """Make BEST name the best valid checkpoint up to the one that is resumed."""
    found: list[tuple[Mapping[str, Any], Path]] = []
    for folder in checkpoint_folders(checkpoints, last=step_of(saved.folder)):
        with contextlib.suppress(CheckpointError):
            metrics, step = load_info(folder).metrics, step_of(folder)
            found.append((metrics if metrics.get("step") == step else {"step": step}, folder))
    notices = list(saved.notices)
    for row, folder in sorted(found, key=lambda pair: quality(pair[0]), reverse=True):
        try:
            load_weights(folder)
        except CheckpointError as error:
            notices.append(f"skipped a corrupt checkpoint: {error}")
            continue
        try:
            named = read_pointer(checkpoints, "BEST")
        except CheckpointError as error:
            named = None
            notices.append(f"{error}; it now names {folder.name}")
        if named != folder:
            write_pointer(checkpoints, "BEST", folder)
        return saved._replace(best=row, notices=notices)
    raise CheckpointError(f"{checkpoints}: no valid checkpoint")  # the newest was, a moment ago
