"""Files of torch.save from anybody: only plain tensors are unpickled, never code."""

import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from vitrine.errors import CheckpointError

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts keep the state dict in a larger file."""
BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError,
          AttributeError, OverflowError, AssertionError, MemoryError, struct.error)  # fmt: skip
"""What torch's reader of tensors raises on damaged files."""
LONGEST_GLOBAL = 200
"""Characters of a module's and a function's name."""


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors that torch.save wrote, by name.

    Raises:
        CheckpointError: it is damaged, would run code, or holds anything but tensors by name.
    """
    refuse_packed(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles; what is wrong is told below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a sound file of weights: {reason:.100}") from error
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(map(is_plain, state.keys(), state.values())):
        raise CheckpointError(f"{path}: not a state dict of plain tensors")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def refuse_packed(path: Path) -> None:
    """Refuse what torch.save does not write: no zip file, or one that grows when it is read."""
    if not path.is_file():
        return  # the reader says what is wrong
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
            f"{path}: not a sound file of weights: torch.save writes a zip file"
        ) from error


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
