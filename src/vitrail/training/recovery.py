"""A run folder after a fault: whose it is, what in it is sound, and where to go on from.

A run may die between any two writes. What it left half done is cleared away here, what it had moved
aside is put back, and LAST and BEST name again what they should.
"""

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import BaseFileLock, FileLock, Timeout
from torch import Tensor

from vitrail.config.files import MOVABLE
from vitrail.config.settings import Config
from vitrail.errors import CheckpointError, OutputError
from vitrail.training.run_folder import checkpoint_folders
from vitrail.weights.checkpoint import (
    CheckpointInfo,
    clear,
    load_info,
    load_training,
    load_weights,
    read_pointer,
    step_of,
    write_pointer,
)

LOCK = ".lock"
"""A file that the writing process holds; the system lets go of it when the process ends."""


class SavedState(NamedTuple):
    """A checkpoint in memory, and what was wrong with others that were passed over."""

    folder: Path
    info: CheckpointInfo
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    best: dict[str, Any]
    """The line of metrics.jsonl of the checkpoint that BEST names; empty before the first epoch."""
    notices: list[str]


def hold(folder: Path) -> AbstractContextManager[object]:
    """Keep other processes from writing a run folder until this lock is released or garbage.

    A process may hold it several times over, as in a notebook that goes on with its own run.

    Raises:
        OutputError: another process holds it, or the folder cannot be written.
    """
    try:
        return lock_of(folder).acquire()
    except Timeout:
        raise OutputError(
            f"{folder}: another run is writing there: let it end, or give another --folder_name"
        ) from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from error


def release(folder: Path) -> None:
    """Let other processes write a folder that this one holds, however many times it does."""
    lock_of(folder).release(force=True)


def lock_of(folder: Path) -> BaseFileLock:
    """Return the lock of a run folder, one object for the whole process."""
    return FileLock(folder / LOCK, timeout=0, is_singleton=True, thread_local=False)


def recover(folder: Path, config: Config) -> SavedState | None:
    """Mend a run folder and load its newest checkpoint that is whole and unchanged.

    Returns:
        None where the run was stopped before its first checkpoint.

    Raises:
        CheckpointError: it is no run folder, none of its checkpoints is sound, or they were made
            with other settings.
        OutputError: the folder cannot be written.
    """
    require_run_folder(folder)
    checkpoints = folder / "checkpoints"
    tidy(checkpoints)
    if (folder / "config.json").is_file() and not checkpoint_folders(checkpoints):
        return None
    saved = newest_sound(checkpoints)
    require_same(config, saved)
    write_pointer(checkpoints, "LAST", saved.folder)
    return mend_best(checkpoints, saved)


def require_run_folder(folder: Path) -> None:
    """Refuse a folder without a run. Nothing is written.

    Raises:
        CheckpointError: it has neither settings nor checkpoints.
    """
    if not ((folder / "config.json").is_file() or (folder / "checkpoints").is_dir()):
        raise CheckpointError(f"{folder}: no run folder (it has no checkpoints/)")


def newest_sound(checkpoints: Path) -> SavedState:
    """Load the newest checkpoint of a run that is whole and unchanged.

    Raises:
        CheckpointError: there is none.
    """
    wrong: list[str] = []
    for folder in reversed(checkpoint_folders(checkpoints)):
        try:
            state = (load_info(folder), load_weights(folder), load_training(folder))
        except CheckpointError as error:
            wrong.append(f"passed over a damaged checkpoint: {error}")
        else:
            return SavedState(folder, *state, {}, wrong)
    reason = wrong[0] if wrong else "the run was stopped before its first one"
    raise CheckpointError(f"{checkpoints}: no sound checkpoint to go on from: {reason}")


def mend_best(checkpoints: Path, saved: SavedState) -> SavedState:
    """Let BEST name the best sound checkpoint up to the newest, as if nothing had happened."""
    found: list[tuple[tuple[float, ...], Path, dict[str, Any]]] = []
    for folder in checkpoint_folders(checkpoints, last=step_of(saved.folder)):
        try:
            info = load_info(folder)
        except CheckpointError:
            continue
        step = step_of(folder) or 0
        row = dict(info.metrics) if info.metrics.get("step") == step else {}
        found.append((rank(row, step), folder, row))
    notices = list(saved.notices)
    for _, folder, row in sorted(found, key=lambda item: item[0], reverse=True):
        try:
            load_weights(folder)
        except CheckpointError as error:
            notices.append(f"passed over a damaged checkpoint: {error}")
            continue
        try:
            named = read_pointer(checkpoints, "BEST")
        except CheckpointError as error:
            named = None
            notices.append(f"{error}; it now names {folder.name}")
        if named != folder:
            write_pointer(checkpoints, "BEST", folder)
        return saved._replace(best=row, notices=notices)
    raise CheckpointError(f"{checkpoints}: no sound checkpoint")  # the newest was, a moment ago


def rank(row: dict[str, Any], step: int) -> tuple[float, ...]:
    """Return what orders checkpoints as is_best() does: whole epochs, accuracy, loss, the first.

    Without validation the newest epoch is the best.
    """
    if "validation_accuracy" in row:
        return 1, row["validation_accuracy"], -row["validation_loss"], -step
    return (1 if row else 0), 0, 0, step


def require_same(config: Config, saved: SavedState) -> None:
    """Refuse to go on with other settings than the checkpoint was made with."""
    asked, made = config.flat(), saved.info.config.flat()
    other = [name for name in made if name not in MOVABLE and asked[name] != made[name]]
    other = [name for name in other if (name, asked[name]) != ("n_classes", 0)]
    if other:
        told = ", ".join(f"{name} {asked[name]!r} (not {made[name]!r})" for name in other)
        raise CheckpointError(
            f"{saved.folder}: made with other settings than config.json has: {told:.200}: put "
            "config.json right, or start another run"
        )


def tidy(checkpoints: Path) -> None:
    """Clear away what a killed run left half done; put back what it had moved aside.

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
                path.unlink() if path.is_file() else clear(path)
    except OSError as error:
        raise OutputError(f"{checkpoints}: cannot be written: {error.strerror}") from error
