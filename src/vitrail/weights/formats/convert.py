"""Reads and writes the weights of other systems: the reference, timm, Hugging Face and Google."""

import dataclasses
import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitrail.config.settings import PREPARATION, DataConfig, ModelConfig
from vitrail.errors import CheckpointError, ConfigError
from vitrail.model.layers import sincos_table
from vitrail.model.vit import VisionTransformer
from vitrail.runtime.files import replace_file, write_json
from vitrail.weights.checkpoint import CheckpointInfo, pack, read_bytes, read_json_object, unpack
from vitrail.weights.formats import huggingface, timm
from vitrail.weights.formats.google import GOOGLE
from vitrail.weights.formats.layout import State, first_few, read_rules, write_rules
from vitrail.weights.formats.reference import REFERENCE
from vitrail.weights.formats.torch_pickle import READ_ERRORS, read_pickle, unwrap_names

LAYOUTS = {
    layout.name: layout for layout in (REFERENCE, timm.TIMM, huggingface.HUGGINGFACE, GOOGLE)
}
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights file in a folder, in order of preference."""
SUFFIXES = {"reference": ".pt", "google": ".npz"}
"""Layouts that are one file; the others are folders."""
FILES = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".npz")
"""Extensions of weights files."""
MAX_EXPANSION = 20
"""Maximum ratio of an archive's unpacked size to its own."""


class Converted(NamedTuple):
    """Another system's model, converted to our settings and tensors."""

    layout: str
    config: ModelConfig
    """n_classes is 0 if the weights have no head."""
    weights: dict[str, Tensor]
    tensors: int
    """Number of tensors that were read."""
    notes: list[str]
    """What was assumed, changed or ignored."""
    classes: tuple[str, ...]
    """Class names, if the files contain them."""
    data: dict[str, Any]
    """How pictures are prepared: the fields of PREPARATION."""
    assumed: tuple[str, ...]
    """The fields of ``data`` that the files do not specify."""
    refused: dict[str, str]
    """The fields of ``data`` whose value in the files Vitrail does not support, and that value."""


def read_foreign(path: Path, n_attention_heads: int | None) -> Converted:
    """Read a file or folder of another system.

    Raises:
        CheckpointError: it is corrupt, of no known layout, or has missing or extra tensors.
        ConfigError: the width is not a multiple of the head count.
    """
    weights, files = _find_weights(path)
    state, notes = read_state(weights)
    try:
        found = convert(state, files, n_attention_heads=n_attention_heads)
        return found._replace(notes=notes + found.notes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError,
            MemoryError) as error:  # fmt: skip
        # The files are untrusted: any value may have any type, any tensor any shape.
        what = CONFIG if files else "its content"
        raise CheckpointError(f"{path}: {what} is not that of a ViT: {error!s:.100}") from error


def _find_weights(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the weights file at a path and the content of the JSON files beside it, by name."""
    if not path.is_dir():
        return path, {}
    for name in WEIGHTS:
        if (path / name).is_file():
            break
    else:
        raise CheckpointError(f"{path}: no {' or '.join(WEIGHTS)} in this folder")
    present = [path / file for file in (CONFIG, PROCESSOR) if (path / file).is_file()]
    return path / name, {file.name: read_json_object(file) for file in present}


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a file by name, and notes of what was ignored.

    Only tensors are unpickled, never code.
    """
    if path.suffix == ".safetensors":
        return unpack(read_bytes(path), path), []
    if path.suffix == ".npz":
        return _read_npz(path), []
    return read_pickle(path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a NumPy archive."""
    try:
        content = read_bytes(path)
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            size = sum(part.file_size for part in opened.infolist())
        if size > MAX_EXPANSION * len(content):
            raise CheckpointError(f"{path}: refused: it expands to {size:,} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: torch.from_numpy(np.asarray(archive[name])) for name in archive.files}
    except (*READ_ERRORS, zipfile.BadZipFile, zlib.error, OSError, SyntaxError) as error:
        raise CheckpointError(f"{path}: not a valid .npz file: {error!s:.100}") from error


def convert(
    state: State, files: dict[str, Any] | None = None, *, n_attention_heads: int | None = None
) -> Converted:
    """Convert another system's state dict to our settings and state dict.

    Layers, widths, patch, image, channels and classes are read off the shapes. Head count,
    activation and class names are not in every file; ``notes`` lists what was assumed.

    Args:
        state: the tensors, by their names in the file.
        files: the content of the JSON files beside it, by name.
        n_attention_heads: the head count, if the files do not specify it.

    Raises:
        CheckpointError: keys are missing, unknown or have wrong shapes; it names the first.
        ConfigError: the width is not a multiple of the head count.
    """
    state, notes = unwrap_names(
        state, lambda key: any(layout.key_pattern.match(key) for layout in LAYOUTS.values())
    )
    hits = {
        name: sum(map(bool, map(each.key_pattern.match, state))) for name, each in LAYOUTS.items()
    }
    layout = LAYOUTS[max(hits, key=lambda name: hits[name])]
    if hits[layout.name] == 0:
        raise CheckpointError(
            f"unrecognized weights format (known: {', '.join(LAYOUTS)}); "
            f"keys {first_few(list(state))}"
        )
    wrong = [k for k, t in state.items() if t.numel() == 0 or not t.is_floating_point()]
    if wrong:
        raise CheckpointError(f"tensors that are empty or not floating point: {first_few(wrong)}")
    floats = {key: tensor.float() for key, tensor in state.items()}
    found = layout.find(floats, files or {}, n_attention_heads)
    rules = layout.rules(found.config)
    weights, unknown = read_rules(rules, found.state, _empty_state(found.config), layout.name)
    if unknown:
        raise CheckpointError(f"keys unknown to layout {layout.name}: {first_few(sorted(unknown))}")
    classes = found.classes if len(found.classes) == found.config.n_classes else ()
    usual = {name: getattr(DataConfig(), name) for name in PREPARATION} | found.usual
    assumed = tuple(name for name in usual if name not in found.data and usual[name] is not None)
    return Converted(
        layout.name, found.config, weights, len(state), _group_notes(notes + found.notes), classes,
        usual | found.data, assumed, found.refused,
    )  # fmt: skip


def _empty_state(config: ModelConfig) -> dict[str, Tensor]:
    """Return the state dict of such a model as meta tensors (shapes without content)."""
    with torch.device("meta"):
        model = VisionTransformer(dataclasses.replace(config, n_classes=config.n_classes or 1))
    return dict(model.state_dict())


def _group_notes(notes: list[str]) -> list[str]:
    """Join notes that have the same text for several keys."""
    keys: dict[str, list[str]] = {}
    for note in notes:
        key, _, words = note.partition(": ") if ": " in note else ("", "", note)
        keys.setdefault(words, []).append(key)
    return [f"{first_few(names)}: {words}" if names[0] else words for words, names in keys.items()]


def convert_back(config: ModelConfig, weights: State, layout: str) -> dict[str, Tensor]:
    """Return our weights as another layout's state dict.

    Raises:
        ConfigError: the layout cannot represent such a model.
    """
    needs = {"stem": ("patch",), "position": ("learned",)} | LAYOUTS[layout].needs
    weights = dict(weights)
    if config.position == "sincos":
        weights["position_ND"] = sincos_table(config.grid_GJ, config.embed_dim)
        config = dataclasses.replace(config, position="learned")
    wrong = [name for name, allowed in needs.items() if getattr(config, name) not in allowed]
    if wrong:
        has = ", ".join(f"{name} {getattr(config, name)}" for name in wrong)
        flags = " ".join(f"--{name} {' or '.join(map(str, needs[name]))}" for name in wrong)
        raise ConfigError(f"the layout {layout} does not support {has}: train with {flags}")
    return write_rules(LAYOUTS[layout].rules(config), weights)


def write_foreign(
    path: Path, layout: str, info: CheckpointInfo, weights: Mapping[str, Tensor]
) -> None:
    """Write a model as another system's file, or folder with its configuration.

    Raises:
        ConfigError: the layout cannot represent such a model, or the path has a wrong extension.
        OutputError: it cannot be written.
    """
    wanted = SUFFIXES.get(layout)
    if wanted is not None and path.suffix != wanted:
        raise ConfigError(f"{path}: the layout {layout} needs a name that ends in {wanted}")
    if wanted is None and (path.is_file() or path.name.endswith(FILES)):
        raise ConfigError(f"{path}: the layout {layout} is a folder: give the name of a folder")
    state = convert_back(info.config.model, weights, layout)
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
        _write_folder(path, layout, info, state)


def _write_folder(path: Path, layout: str, info: CheckpointInfo, state: dict[str, Tensor]) -> None:
    """Write weights and the JSON files from which timm or Hugging Face builds the model."""
    model, data = info.config.model, info.config.data
    colors = {"mean": data.mean, "std": data.std}
    if model.n_channels == 1:  # as data.images.normalize does
        colors = {name: (sum(values) / 3,) for name, values in colors.items()}  # type: ignore[misc]
    about = {**colors, "classes": info.classes, "data": data}
    describe = timm.describe if layout == "timm" else huggingface.describe
    files = {CONFIG: describe(model, about)}
    if layout == "huggingface":
        files[PROCESSOR] = huggingface.write_processor(model, data, about)
    for name, content in files.items():
        write_json(path / name, content)
    replace_file(path / WEIGHTS[0], pack(state, {"format": "pt"}))
