"""Reads and writes the weights of other libraries: the reference, timm, Hugging Face and Google.

Files of torch.save are unpickled without running code, and wrapper prefixes of names are removed.
"""

import argparse
import dataclasses
import io
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.config.settings import PREPARATION, DataConfig, ModelConfig
from vitrail.errors import CheckpointError, ConfigError, printable
from vitrail.model.layers import sincos_table
from vitrail.model.vit import VisionTransformer
from vitrail.runtime.files import replace_file, write_json
from vitrail.weights.checkpoint import CheckpointInfo, pack, read_bytes, read_json_object, unpack
from vitrail.weights.formats import Converted, State, backbones, first_few, huggingface, timm
from vitrail.weights.formats.huggingface import PROCESSOR
from vitrail.weights.formats.single_file import GOOGLE, REFERENCE

LAYOUTS = {
    layout.name: layout
    for layout in (
        REFERENCE, timm.TIMM, huggingface.HUGGINGFACE, backbones.DINOV2, backbones.DINOV3,
        backbones.CLIP, GOOGLE,
    )
}  # fmt: skip
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights file in a folder, in order of preference."""
SUFFIXES = {"reference": ".pt", "google": ".npz"}
"""Layouts that are a single file; the others are folders."""
FILES = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".npz")
"""Extensions of weights files."""
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
SCALAR = np.float64(0).__reduce__()[0]
"""The function that builds NumPy scalars; its module has an old and a new name."""
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    *(int, float, list, dict, set),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
    # Lightning's hyperparameters and defaultdicts, which torch does not fill: read as dictionaries.
    (dict, "lightning_fabric.utilities.data.AttributeDict"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (lambda *_: {}, "collections.defaultdict"),
]
"""Types that training scripts save with the weights and that run no code when unpickled."""
WRITABLE: dict[str, tuple[Any, ...]] = {
    "stem": ("patch",), "position": ("learned",), "pool": ("cls", "mean"), "n_registers": (0,),
    "layer_scale": (0,), "pre_norm": (False,), "hidden_act": ("gelu", "gelu_tanh"),
}  # fmt: skip
"""Values of settings that every layout can represent; each layout has more requirements."""
REMEDY = "Save the state dict alone: torch.save(model.state_dict(), 'weights.pth')"


# --- from other libraries -------------------------------------------------------------------------


def read_foreign(path: Path, n_attention_heads: int | None) -> Converted:
    """Read a file or folder of another library.

    Raises:
        CheckpointError: it is corrupt, of no known layout, or has missing or extra tensors.
        ConfigError: the width is not a multiple of the head count.
    """
    weights, files = _find_weights(path)
    state, notes = read_state(weights)
    try:
        found = convert(state, files, n_attention_heads=n_attention_heads)
        return found._replace(notes=notes + found.notes)
    except ConfigError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # any value in the files may have any type, any tensor any shape
        what = CONFIG if files else "its content"
        raise CheckpointError(f"{path}: {what} is not that of a ViT: {error!s:.100}") from error


def _find_weights(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the weights file at a path and the content of the JSON files beside it, by name."""
    if not path.is_dir():
        return path, {}
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{path}: no {' or '.join(WEIGHTS)} in this folder")
    present = [path / file for file in (CONFIG, PROCESSOR) if (path / file).is_file()]
    return weights, {file.name: read_json_object(file) for file in present}


def read_state(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a file by name, and notes of what was ignored.

    Raises:
        CheckpointError: it is corrupt, would run code, or is not a state dict of tensors.
    """
    if path.suffix == ".safetensors":
        return unpack(read_bytes(path), path), []
    if path.suffix != ".npz":
        return _read_pickle(path)
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}, []
    except Exception as error:  # NumPy raises many kinds
        raise CheckpointError(f"{path}: not a valid .npz file: {error!s:.100}") from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that torch.save wrote, by name, and notes of what was ignored."""
    state, notes = _unpickle(path), []
    while tables := [name for name in TABLE_NAMES if _holds_table(state, name)]:
        if len(tables) > 1:
            notes.append(f"{tables[0]} is used; ignored in the same file: {first_few(tables[1:])}")
        state = state[tables[0]]
    what = ""
    if not isinstance(state, dict):
        what = f"but a {type(state).__name__}"
    elif not state:
        what = "but empty"
    elif wrong := [str(name) for name, value in state.items() if not _is_plain(name, value)]:
        what = f"because of its entry {printable(wrong[0])[:60]!r}"
    if what:
        raise CheckpointError(f"{path}: not a state dict of plain tensors, {what}. {REMEDY}")
    return dict(state), notes


def _unpickle(path: Path) -> Any:
    """Return the content of a file of torch.save if nothing in it would run code."""
    with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE_GLOBALS):
        warnings.simplefilter("ignore")  # about unusual pickles; errors are reported below
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        except Exception as error:  # torch raises many kinds
            what = "corrupt, or not only tensors and plain values"
            if name := _unsafe_global(path):
                what = f"it contains {name}, which could run code. {REMEDY}"
            raise CheckpointError(f"{path}: not a valid weights file: {what}") from error


def _unsafe_global(path: Path) -> str:
    """Return the name of the global that torch refuses to unpickle, or '' if it refuses none."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  (the file is corrupt)
        return ""
    return printable(min(found, default=""))[:80]


def _holds_table(state: object, name: str) -> bool:
    """Return whether a dictionary has a non-empty dictionary under this name."""
    return isinstance(state, dict) and isinstance(state.get(name), dict) and bool(state[name])


def _is_plain(name: object, value: object) -> bool:
    """Return whether an entry is a named tensor with its values."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_meta
    )


def _unwrap_names(state: State) -> tuple[State, list[str]]:
    """Remove prefixes such as ``module.`` from the names; return notes of what was changed, too."""
    notes: list[str] = []
    if any(COMPILED in key for key in state):
        state = {key.replace(COMPILED, ""): tensor for key, tensor in state.items()}
        notes.append(f"{COMPILED} removed from the names (torch.compile)")
    removed, ignored = "", []
    while not any(layout.key_pattern.match(key) for key in state for layout in LAYOUTS.values()):
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


def convert(
    state: State, files: dict[str, Any] | None = None, *, n_attention_heads: int | None = None
) -> Converted:
    """Convert another library's state dict to our settings and state dict.

    Layers, widths, patch, image, channels and classes are read off the shapes. Head count,
    activation and class names are not in every file (``files``: the JSON files beside it, by name);
    ``notes`` lists what was assumed.

    Raises:
        CheckpointError: keys are missing, unknown or have wrong shapes; some are named.
        ConfigError: the width is not a multiple of the head count.
    """
    state, notes = _unwrap_names(state)
    layout = max(
        LAYOUTS.values(), key=lambda each: len(list(filter(each.key_pattern.match, state)))
    )
    if not any(map(layout.key_pattern.match, state)):
        raise CheckpointError(
            f"unrecognized weights format (known: {', '.join(LAYOUTS)}); "
            f"keys {first_few(list(state))}"
        )
    wrong = [k for k, t in state.items() if t.numel() == 0 or not t.is_floating_point()]
    if wrong:
        raise CheckpointError(f"tensors that are empty or not floating point: {first_few(wrong)}")
    floats = {key: tensor.float() for key, tensor in state.items()}
    found = layout.find(floats, files or {}, n_attention_heads)
    usual = {name: getattr(DataConfig(), name) for name in PREPARATION} | dict(found.usual)
    return found._replace(
        weights=layout.to_ours(found.config, found.weights, _empty_state(found.config)),
        notes=notes + found.notes,
        classes=found.classes if len(found.classes) == found.config.n_classes else (),
        data={**usual, **found.data},
        layout=layout.name,
        tensors=len(state),
        assumed=tuple(n for n in usual if n not in found.data and usual[n] is not None),
    )


def _empty_state(config: ModelConfig) -> dict[str, Tensor]:
    """Return the state dict of such a model as meta tensors (shapes without content)."""
    with torch.device("meta"):
        return VisionTransformer(config).state_dict()


# --- to other libraries ---------------------------------------------------------------------------


def convert_back(config: ModelConfig, weights: State, layout: str) -> dict[str, Tensor]:
    """Return our weights as another layout's state dict, if it can represent such a model."""
    needs = {**WRITABLE, **LAYOUTS[layout].needs}
    weights = dict(weights)
    if config.position == "sincos":
        weights["position_ND"] = sincos_table(config.grid_GJ, config.embed_dim)
        config = dataclasses.replace(config, position="learned")
    wrong = [name for name, allowed in needs.items() if getattr(config, name) not in allowed]
    if wrong:
        has = ", ".join(f"{name} {getattr(config, name)}" for name in wrong)
        flags = " ".join(f"--{name} {' or '.join(map(str, needs[name]))}" for name in wrong)
        raise ConfigError(f"the layout {layout} does not support {has}: train with {flags}")
    return LAYOUTS[layout].to_theirs(config, weights)


def write_foreign(
    path: Path, layout: str, info: CheckpointInfo, weights: Mapping[str, Tensor]
) -> None:
    """Write a model as another library's file, or folder with its configuration."""
    wanted = SUFFIXES.get(layout)
    if wanted is not None and path.suffix != wanted:
        raise ConfigError(f"{path}: the layout {layout} needs a name that ends in {wanted}")
    if wanted is None and (path.is_file() or path.name.endswith(FILES)):
        raise ConfigError(f"{path}: the layout {layout} is a folder: give the name of a folder")
    state = convert_back(info.config.model, weights, layout)
    describe = LAYOUTS[layout].describe
    if describe is not None:
        files = describe(info.config.model, info.config.data, info.classes)
        for name, content in files.items():
            write_json(path / name, content)
        replace_file(path / WEIGHTS[0], pack(state, {"format": "pt"}))
        return
    file = io.BytesIO()
    if layout == "google":
        arrays: dict[str, Any] = {key: tensor.cpu().numpy() for key, tensor in state.items()}
        np.savez(file, **arrays)
    else:
        torch.save({key: tensor.cpu().clone() for key, tensor in state.items()}, file)
    replace_file(path, file.getvalue())
