"""Files of torch.save: unpickles tensors, never code, and removes wrappers around their names."""

import argparse
import pickle
import pickletools
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import CheckpointError, printable
from vitrail.weights.formats.layout import State, first_few

TABLE_NAMES = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "state_dict",
    "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params",
    "student",
)  # fmt: skip
"""Keys under which training scripts keep a state dict, in order of preference: averages first."""


COMPILED = "_orig_mod."
"""Prefix that torch.compile adds to names."""
MODULE_NAMES = (
    "ema_model", "model_ema", "ema", "teacher", "module", "model", "net", "network", "backbone",
    "student",
)  # fmt: skip
"""Attributes under which programs keep a model, in order of preference: averages first."""


def _plain_dict(*_: object) -> dict[Any, Any]:
    """Return an empty dictionary in place of a defaultdict, which torch does not fill."""
    return {}


SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_plain_dict, "collections.defaultdict"),
    *(int, float, list, dict, set),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
    # Old and new name of the function that builds NumPy scalars.
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (PurePosixPath, "pathlib.PosixPath"),
    (PureWindowsPath, "pathlib.WindowsPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
    (PureWindowsPath, "pathlib._local.WindowsPath"),
    # Lightning's hyperparameters, read as a plain dictionary.
    (dict, "lightning_fabric.utilities.data.AttributeDict"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]
"""What training scripts save with the weights and what runs no code when it is unpickled."""
SAFE_GLOBALS_LOCK = threading.Lock()
"""torch's list of safe globals is process-wide, so one file is read at a time."""
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of the files that torch.save wrote before torch 1.6."""
SAVE_COMMAND = "torch.save(model.state_dict(), 'weights.pth')"
READ_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError,
               AttributeError, OverflowError, AssertionError, MemoryError,
               struct.error)  # fmt: skip
"""Exceptions that torch and NumPy raise on corrupt files."""
MAX_GLOBAL_NAME = 200
"""Maximum length of a module's and a function's name together."""


def read_pickle(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that torch.save wrote, by name, and notes of what was ignored.

    Raises:
        CheckpointError: it is corrupt, would run code, or is not a state dict of tensors.
    """
    _refuse_unsafe_file(path)
    state, notes = _load_plain(path), []
    while tables := [name for name in TABLE_NAMES if _holds_table(state, name)]:
        if len(tables) > 1:
            notes.append(f"{tables[0]} is used; ignored in the same file: {first_few(tables[1:])}")
        state = state[tables[0]]
    _refuse_other_than_tensors(state, path)
    return dict(state), notes


def _holds_table(state: object, name: str) -> bool:
    """Return whether a dictionary has a non-empty dictionary under this name."""
    return isinstance(state, dict) and isinstance(state.get(name), dict) and bool(state[name])


def _load_plain(path: Path) -> Any:
    """Return the content of a file if nothing in it would run code."""
    try:
        with (
            SAFE_GLOBALS_LOCK,
            warnings.catch_warnings(),
            torch.serialization.safe_globals(SAFE_GLOBALS),
        ):
            warnings.simplefilter("ignore")  # about unusual pickles; errors are reported below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except READ_ERRORS as error:
        name = _unsafe_global(path)
        what = "corrupt, or more than tensors and plain values"
        if name:
            what = f"it contains {name}, which could run code. Save the state dict alone: "
            what += SAVE_COMMAND
        raise CheckpointError(f"{path}: not a valid weights file: {what}") from error


def _unsafe_global(path: Path) -> str:
    """Return the name of the global that torch refuses to unpickle, or '' if it refuses none."""
    try:
        with SAFE_GLOBALS_LOCK, torch.serialization.safe_globals(SAFE_GLOBALS):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (*READ_ERRORS, OSError):
        return ""
    return printable(min(found))[:80] if found else ""


def _refuse_other_than_tensors(state: object, path: Path) -> None:
    """Refuse anything but a dictionary of plain tensors, with the reason."""
    what = ""
    if not isinstance(state, dict):
        what = f"but a {type(state).__name__}"
    elif not state:
        what = "but empty"
    elif wrong := [str(name) for name, value in state.items() if not _is_plain(name, value)]:
        what = f"because of its entry {printable(wrong[0])[:60]!r}"
    if what:
        raise CheckpointError(
            f"{path}: not a state dict of plain tensors, {what}. Save the state dict alone: "
            f"{SAVE_COMMAND}"
        )


def _is_plain(name: object, tensor: object) -> bool:
    """Return whether a tensor is dense, on the CPU, and backed by as many numbers as it shows."""
    return (
        isinstance(name, str)
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _refuse_unsafe_file(path: Path) -> None:
    """Refuse files that torch.save does not write: no zip file, or one that is compressed."""
    if not path.is_file():
        return  # torch.load reports it
    _refuse_legacy(path)
    try:
        with zipfile.ZipFile(path) as opened:
            parts = opened.infolist()
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise CheckpointError(f"{path}: refused: compressed, which torch.save never does")
            for part in parts:
                if part.filename.endswith("data.pkl"):
                    _refuse_long_names(opened.read(part), path)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, zlib.error,
            struct.error) as error:  # fmt: skip
        raise CheckpointError(
            f"{path}: not a valid weights file: torch.save writes a zip file"
        ) from error


def _refuse_legacy(path: Path) -> None:
    """Refuse files from before torch 1.6, with the command that converts them."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(LEGACY_MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if magic == LEGACY_MAGIC:
        raise CheckpointError(
            f"{path}: written by torch before 1.6: convert it in Python: "
            "torch.save(torch.load('old.pth', weights_only=True), 'new.pth')"
        )


def _refuse_long_names(content: bytes, path: Path) -> None:
    """Refuse long names of globals: torch's error message grows with their square."""
    for code, argument, _ in pickletools.genops(content):
        if code.name in ("GLOBAL", "INST") and len(str(argument)) > MAX_GLOBAL_NAME:
            raise CheckpointError(f"{path}: refused: it would run {argument:.40}…")


def unwrap_names(state: State, is_known: Callable[[str], bool]) -> tuple[State, list[str]]:
    """Remove prefixes such as ``module.`` or ``teacher.backbone.`` from the tensors' names.

    Args:
        state: tensors by their names in the file.
        is_known: whether a name belongs to a layout that can be read.

    Returns:
        the tensors by the model's own names, and notes of what was changed or ignored.
    """
    notes = []
    if any(COMPILED in key for key in state):
        state = {key.replace(COMPILED, ""): tensor for key, tensor in state.items()}
        notes.append(f"{COMPILED} removed from the names (torch.compile)")
    removed = ""
    ignored: list[str] = []
    while not any(map(is_known, state)):
        heads = {key.partition(".")[0] for key in state}
        wrapper = next((name for name in MODULE_NAMES if name in heads), None)
        if wrapper is None:
            break
        prefix = f"{wrapper}."
        ignored += [removed + key for key in state if not key.startswith(prefix)]
        state = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        removed += prefix
    if removed:
        notes.append(f"{removed} removed from the names")
    if ignored:
        notes.append(f"ignored, not under {removed}: {first_few(ignored)}")
    return state, notes
