"""The files of a run folder, apart from the training that fills them."""

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vitrine.checkpoint import (
    CheckpointInfo,
    load_info,
    load_training,
    load_weights,
    read_pointer,
)
from vitrine.errors import CheckpointError, ConfigError, OutputError
from vitrine.files import write_json_lines


class SavedState(NamedTuple):
    """A checkpoint in memory, and what was wrong with newer ones that were passed over."""

    folder: Path
    info: CheckpointInfo
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    passed_over: list[str]


def new_folder(output_path: Path, folder_name: str, default_name: str) -> Path:
    """Make the folder of a new run: of the name asked for, or of the default one, numbered.

    Raises:
        ConfigError: the name asked for is taken.
        OutputError: the folder cannot be made.
    """
    numbered = (f"{default_name}-{number}" for number in range(2, 100_000))
    for name in [folder_name] if folder_name else [default_name, *numbered]:
        try:
            (output_path / name).mkdir(parents=True)
        except FileExistsError:
            if folder_name:
                raise ConfigError(
                    f"{output_path / name} is there already: give another --folder_name, or go on "
                    f"with --resume {output_path / name}"
                ) from None
        except OSError as error:
            raise OutputError(f"{output_path / name}: cannot be made: {error.strerror}") from error
        else:
            return output_path / name
    raise OutputError(f"{output_path}: too many runs named {default_name}: give --folder_name")


def newest_sound(checkpoints: Path) -> SavedState:
    """Load the newest checkpoint of a run that is whole and unchanged.

    Raises:
        CheckpointError: there is none.
    """
    if not checkpoints.is_dir():
        raise CheckpointError(f"{checkpoints.parent}: no run folder (it has no checkpoints/)")
    passed_over: list[str] = []
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            state = (load_info(folder), load_weights(folder), load_training(folder))
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return SavedState(folder, *state, passed_over)
    wrong = f": {passed_over[0]}" if passed_over else ": the run was stopped before its first one"
    raise CheckpointError(f"{checkpoints}: no sound checkpoint to go on from{wrong}")


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all checkpoints but BEST and the ``keep`` newest (0 keeps all)."""
    folders = sorted(checkpoints.glob("step-*"))
    kept = {*folders[-keep:], read_pointer(checkpoints, "BEST"), read_pointer(checkpoints, "LAST")}
    for folder in set(folders) - kept:
        # Renamed first, so that a kill in the middle leaves nothing that looks whole.
        doomed = folder.with_name(f".old-{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, or none.

    Raises:
        CheckpointError: a line is not what a run wrote.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:  # wrong JSON or UTF-8, a number too long
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if not all(map(is_row, rows)):
        raise CheckpointError(f"{path}: damaged: a line is not an epoch of a run")
    return rows


def is_row(row: Any) -> bool:
    """Tell whether a line is an epoch of a run: numbers by name, and its step and epoch."""
    return (
        isinstance(row, dict)
        and all(value is None or is_number(value) for value in row.values())
        and all(type(row.get(name)) is int for name in ("step", "epoch"))
    )


def is_number(value: Any) -> bool:
    """Tell whether a value is a number that can be printed and drawn."""
    return isinstance(value, int | float) and -1e15 < value < 1e15


def log_test_use(folder: Path, purpose: str, images: int) -> None:
    """Add a line to test_uses.jsonl: the test split was opened, when, and what for."""
    path = folder / "test_uses.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    rows = [json.loads(line) for line in lines]
    write_json_lines(path, [*rows, {"time": now, "purpose": purpose, "images": images}])


def is_best(row: dict[str, Any], earlier: list[dict[str, Any]]) -> bool:
    """Tell whether an epoch is the best so far on validation; without validation, the newest is.

    Of equal accuracies the lower loss is better.
    """
    if "validation_accuracy" not in row:
        return True
    scores = [(r["validation_accuracy"], -r["validation_loss"]) for r in [*earlier, row]]
    return scores[-1] == max(scores) and scores.count(scores[-1]) == 1


def is_run_folder(path: Path) -> bool:
    """Tell whether a path is a run folder."""
    return (path / "checkpoints").is_dir()
