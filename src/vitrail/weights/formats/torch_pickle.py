"""Files of torch.save: only plain tensors are unpickled, never code."""

import argparse
import pickle
import pickletools
import struct
import threading
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import CheckpointError, printable
from vitrail.weights.formats.rules import first

WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "state_dict",
    "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params",
    "student",
)  # fmt: skip
"""Keys under which training scripts keep a state dict: averages of the weights before the raw."""


def plain_table(*_: object) -> dict[Any, Any]:
    """Return an empty dictionary: torch fills no other table, not even a defaultdict."""
    return {}


HARMLESS: list[Any] = [
    argparse.Namespace,
    (plain_table, "collections.defaultdict"),
    *(int, float, list, dict, set),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
    # Old and new name of the function that makes NumPy's numbers.
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (PurePosixPath, "pathlib.PosixPath"),
    (PureWindowsPath, "pathlib.WindowsPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
    (PureWindowsPath, "pathlib._local.WindowsPath"),
    # Lightning's table of hyperparameters, read as a plain one.
    (dict, "lightning_fabric.utilities.data.AttributeDict"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]
"""What training scripts keep beside the weights, and what runs no code when it is read."""
ALLOWING = threading.Lock()
"""torch's list of what may be unpickled is global: one file is read at a time."""
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save's files began before torch 1.6."""
SAVE = "torch.save(model.state_dict(), 'weights.pth')"
BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError,
          AttributeError, OverflowError, AssertionError, MemoryError, struct.error)  # fmt: skip
"""What torch's reader of tensors raises on damaged files."""
LONGEST_GLOBAL = 200
"""Characters of a module's and a function's name."""


def read_pickle(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that torch.save wrote, by name, and notes of what was left out.

    Raises:
        CheckpointError: it is damaged, would run code, or holds anything but tensors by name.
    """
    refuse_packed(path)
    state, notes = load_plain(path), []
    while tables := [name for name in WRAPPERS if holds_table(state, name)]:
        if len(tables) > 1:
            notes.append(f"{tables[0]} is taken; in the same file, left out: {first(tables[1:])}")
        state = state[tables[0]]
    refuse_other_than_tensors(state, path)
    return dict(state), notes


def holds_table(state: object, name: str) -> bool:
    """Return whether a table has another one under this name."""
    return isinstance(state, dict) and isinstance(state.get(name), dict) and bool(state[name])


def load_plain(path: Path) -> Any:
    """Return what a file holds, if nothing in it would run code."""
    try:
        with ALLOWING, warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of unusual pickles; what is wrong is reported below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except BROKEN as error:
        name = strange_name(path)
        what = "damaged, or more than tensors and plain values"
        if name:
            what = f"it holds {name}, which could run code. Save the state dict alone: {SAVE}"
        raise CheckpointError(f"{path}: not a valid file of weights: {what}") from error


def strange_name(path: Path) -> str:
    """Return the name of what torch refuses to unpickle, if that is what it refuses."""
    try:
        with ALLOWING, torch.serialization.safe_globals(HARMLESS):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (*BROKEN, OSError):
        return ""
    return printable(min(found))[:80] if found else ""


def refuse_other_than_tensors(state: object, path: Path) -> None:
    """Refuse what is not a table of plain tensors, naming what it is."""
    what = ""
    if not isinstance(state, dict):
        what = f"a {type(state).__name__}"
    elif not state:
        what = "empty"
    elif wrong := [str(name) for name, value in state.items() if not is_plain(name, value)]:
        what = f"its entry {printable(wrong[0])[:60]!r} is none"
    if what:
        raise CheckpointError(
            f"{path}: not a state dict of plain tensors, {what}. Save the state dict alone: {SAVE}"
        )


def refuse_packed(path: Path) -> None:
    """Refuse what torch.save does not write: no zip file, or one that grows when it is read."""
    if not path.is_file():
        return  # the reader reports what is wrong
    refuse_old(path)
    try:
        with zipfile.ZipFile(path) as opened:
            parts = opened.infolist()
            if sum(part.file_size for part in parts) > path.stat().st_size:
                raise CheckpointError(f"{path}: refused: torch.save never compresses")
            for part in parts:
                if part.filename.endswith("data.pkl"):
                    refuse_long_names(opened.read(part), path)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, zlib.error,
            struct.error) as error:  # fmt: skip
        raise CheckpointError(
            f"{path}: not a valid file of weights: torch.save writes a zip file"
        ) from error


def refuse_old(path: Path) -> None:
    """Refuse what torch wrote before it wrote zip files, saying how to write it again."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(OLD))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if begins == OLD:
        raise CheckpointError(
            f"{path}: written by torch before 1.6: write it again, in Python: "
            "torch.save(torch.load('old.pth', weights_only=True), 'new.pth')"
        )


def refuse_long_names(content: bytes, path: Path) -> None:
    """Refuse a pickle that calls something by a long name: torch's message takes its square."""
    for code, argument, _ in pickletools.genops(content):
        if code.name in ("GLOBAL", "INST") and len(str(argument)) > LONGEST_GLOBAL:
            raise CheckpointError(f"{path}: refused: it would run {argument:.40}…")


def is_plain(name: object, tensor: object) -> bool:
    """Tell whether a tensor is dense, in memory, and backed by as many numbers as it shows."""
    return (
        isinstance(name, str)
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )
