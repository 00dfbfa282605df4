"""The files of a run folder, apart from the training that fills them."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from vitrail.errors import CheckpointError, ConfigError, OutputError
from vitrail.runtime.files import replace_file
from vitrail.weights.checkpoint import read_pointer, step_of


def new_folder(output_path: Path, folder_name: str, default_name: str) -> Path:
    """Make the folder of a new run: of the name asked for, or of the default one, numbered.

    An empty folder of the name asked for, as a run leaves that was killed at once, is taken.

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
                require_unused(output_path / name)
                return output_path / name
        except OSError as error:
            raise OutputError(f"{output_path / name}: cannot be made: {error.strerror}") from error
        else:
            return output_path / name
    raise OutputError(f"{output_path}: too many runs named {default_name}: give --folder_name")


def checkpoint_folders(checkpoints: Path, last: int | None = None) -> list[Path]:
    """Return the checkpoint folders in the order of their updates, up to ``last`` if given."""
    steps = {folder: step_of(folder) for folder in checkpoints.glob("step-*")}
    known = {folder: step for folder, step in steps.items() if step is not None}
    wanted = [folder for folder, step in known.items() if last is None or step <= last]
    return sorted(wanted, key=known.__getitem__)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all checkpoints up to LAST but BEST and the ``keep`` newest (0 keeps all).

    Those after LAST were passed over as damaged; training will come to them and write them anew.

    Raises:
        OutputError: one cannot be removed.
    """
    newest, best = (read_pointer(checkpoints, name) for name in ("LAST", "BEST"))
    folders = checkpoint_folders(checkpoints, last=step_of(newest))
    try:
        for folder in set(folders) - {*folders[-keep:], newest, best}:
            # Renamed first, so that a kill in the middle leaves nothing that looks whole.
            doomed = folder.with_name(f".doomed-{folder.name}")
            folder.rename(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise OutputError(f"{checkpoints}: cannot be pruned: {error.strerror}") from error


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
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
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
        fallback: the folder to log in when the model is not from a run, or the run is read-only.
        purpose: what the images were used for.
        images: how many there were.

    Returns:
        a message for the user when the run folder could not be written, else "".

    Raises:
        OutputError: the fallback folder cannot be written either.
    """
    run = run_folder_of(Path(source))
    if run is None:
        log_test_use(fallback, purpose, images)
        return ""
    try:
        log_test_use(run, purpose, images)
    except OutputError as error:
        log_test_use(fallback, purpose, images)
        log = fallback / "test_uses.jsonl"
        return f"{error}; this use of the test split is logged in {log} instead"
    return ""


def run_folder_of(source: Path) -> Path | None:
    """Return the run folder that a model came from: the path itself, or that of a checkpoint."""
    if is_run_folder(source):
        return source
    checkpoints = source.resolve().parent
    return checkpoints.parent if checkpoints.name == "checkpoints" else None


def is_best(row: dict[str, Any], earlier: list[dict[str, Any]]) -> bool:
    """Tell whether an epoch is the best so far on validation; without validation, the newest is.

    Of equal accuracies the lower loss is better.
    """
    if "validation_accuracy" not in row:
        return True
    scores = [(r["validation_accuracy"], -r["validation_loss"]) for r in [*earlier, row]]
    return scores[-1] == max(scores) and scores.count(scores[-1]) == 1


def require_unused(folder: Path) -> None:
    """Refuse a folder in which there is something already.

    Raises:
        ConfigError: it holds a run, or other files.
    """
    if folder.exists() and not is_unused(folder):
        raise ConfigError(
            f"{folder} is there already: give another --folder_name, or resume the run in it with "
            f"--resume {folder}"
        )


def is_unused(path: Path) -> bool:
    """Tell whether a folder holds nothing, or only what a run leaves that never began."""
    return path.is_dir() and all(
        entry.name == ".lock" or entry.name.startswith(".partial-") for entry in path.iterdir()
    )


def is_run_folder(path: Path) -> bool:
    """Tell whether a path is a run folder."""
    return (path / "checkpoints").is_dir()
