"""Files and folders of weights that other systems write, read and written."""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import CheckpointError, ConfigError
from vitrail.runtime.files import replace_file, write_json
from vitrail.weights.checkpoint import CheckpointInfo, pack, read_bytes, unpack
from vitrail.weights.formats import Converted, convert, huggingface, restate, timm
from vitrail.weights.formats.processor import write_processor
from vitrail.weights.formats.torch_pickle import BROKEN, read_pickle

CONFIG, PREPARATION = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a folder; the first that is there is taken."""
SUFFIXES = {"reference": ".pt", "google": ".npz"}
"""Layouts of one file; the others are folders."""
FILES = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".npz")
"""Files of weights, by the end of their names."""
MOST_GROWTH = 20
"""Largest size of an unpacked archive, as a multiple of its size."""


def read_foreign(path: Path, n_attention_heads: int | None) -> Converted:
    """Read a file or folder of another system.

    Raises:
        CheckpointError: it is damaged, of no known layout, or only partly of one.
        ConfigError: the head count does not divide the width.
    """
    weights, files = find_weights(path)
    state, notes = read_state(weights)
    try:
        found = convert(state, files, n_attention_heads=n_attention_heads)
        return found._replace(notes=notes + found.notes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError,
            MemoryError) as error:  # fmt: skip
        # The file is untrusted: any value may be of any type, any tensor of any shape.
        what = CONFIG if files else "what it holds"
        raise CheckpointError(f"{path}: {what} is not one of a ViT: {error!s:.100}") from error


def find_weights(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of weights at a path, and the JSON files beside it, by name."""
    if not path.is_dir():
        return path, {}
    for name in WEIGHTS:
        if (path / name).is_file():
            break
    else:
        raise CheckpointError(f"{path}: no {' or '.join(WEIGHTS)} in this folder")
    beside = [path / file for file in (CONFIG, PREPARATION) if (path / file).is_file()]
    return path / name, {file.name: read_json_object(file) for file in beside}


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:  # wrong JSON or UTF-8, a number too long
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a file by name, and notes of what else is in it.

    Only tensors are unpickled, never code.
    """
    if path.suffix == ".safetensors":
        return unpack(read_bytes(path), path), []
    if path.suffix == ".npz":
        return read_npz(path), []
    return read_pickle(path)


def read_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a NumPy archive."""
    try:
        content = read_bytes(path)
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            size = sum(part.file_size for part in opened.infolist())
        if size > MOST_GROWTH * len(content):
            raise CheckpointError(f"{path}: refused: it grows to {size:,} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: torch.from_numpy(np.asarray(archive[name])) for name in archive.files}
    except (*BROKEN, zipfile.BadZipFile, zlib.error, OSError, SyntaxError) as error:
        raise CheckpointError(f"{path}: not a valid .npz file: {error!s:.100}") from error


def write_foreign(
    path: Path, layout: str, info: CheckpointInfo, weights: Mapping[str, Tensor]
) -> None:
    """Write a model as another system lays it out: a file, or a folder with its JSON files.

    Raises:
        ConfigError: the layout does not support such a model, or the name is not one of its files.
        OutputError: it cannot be written.
    """
    wanted = SUFFIXES.get(layout)
    if wanted is not None and path.suffix != wanted:
        raise ConfigError(f"{path}: the layout {layout} is a file whose name ends in {wanted}")
    if wanted is None and (path.is_file() or path.name.endswith(FILES)):
        raise ConfigError(f"{path}: the layout {layout} is a folder: give a folder's name")
    state = restate(info.config.model, weights, layout)
    if layout == "google":
        archive = io.BytesIO()
        arrays: dict[str, Any] = {key: tensor.cpu().numpy() for key, tensor in state.items()}
        np.savez(archive, **arrays)
        replace_file(path, archive.getvalue())
    elif layout == "reference":
        file = io.BytesIO()
        torch.save({key: tensor.cpu().clone() for key, tensor in state.items()}, file)
        replace_file(path, file.getvalue())
    else:
        write_folder(path, layout, info, state)


def write_folder(path: Path, layout: str, info: CheckpointInfo, state: dict[str, Tensor]) -> None:
    """Write weights and the JSON files from which timm or Hugging Face builds the model."""
    model, data = info.config.model, info.config.data
    colors = {"mean": data.mean, "std": data.std}
    if model.n_channels == 1:  # as data.images.normalize does
        colors = {name: (sum(values) / 3,) for name, values in colors.items()}  # type: ignore[misc]
    about = {**colors, "classes": info.classes, "data": data}
    describe = timm.describe if layout == "timm" else huggingface.describe
    files = {CONFIG: describe(model, about)}
    if layout == "huggingface":
        files[PREPARATION] = write_processor(model, data, about)
    for name, content in files.items():
        write_json(path / name, content)
    replace_file(path / WEIGHTS[0], pack(state, {"format": "pt"}))
