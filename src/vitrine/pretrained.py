"""A name, file or folder -> a model ready to use."""

import dataclasses
import pickle
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from vitrine.checkpoint import (
    CheckpointInfo,
    load_info,
    load_weights,
    load_weights_file,
    read_pointer,
)
from vitrine.config import Config, DataConfig, ModelConfig
from vitrine.data.cifar import CIFAR10_CLASSES
from vitrine.devices import choose_device
from vitrine.errors import CheckpointError
from vitrine.model import VisionTransformer
from vitrine.model.convert import convert_reference, is_reference
from vitrine.predict import Classifier

BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError,
          AttributeError, OverflowError, AssertionError, MemoryError, struct.error)  # fmt: skip
"""What torch's reader of tensors raises on damaged files."""
LONGEST_GLOBAL = 200
"""Characters of a module's and a function's name."""


def load(
    source: str | Path, *, n_attention_heads: int | None = None, device: str = "auto"
) -> Classifier:
    """Return the classifier that a file or folder holds.

    Args:
        source: a run folder (its BEST checkpoint), a checkpoint folder, a ``.safetensors`` file
            of Vitrine, or a ``.pt`` file of the reference system.
        n_attention_heads: the head count of a reference ``.pt``, which its file does not tell (4
            unless given); everything else tells its own.
        device: auto, cpu, cuda or mps.

    Raises:
        CheckpointError: there is nothing to load, or it is damaged or foreign.
        ConfigError: the device is not available.
    """
    chosen, path = choose_device(device), Path(source)
    if path.suffix in (".pt", ".pth") and not path.is_dir():
        info, weights = load_reference(path, n_attention_heads)
    else:
        info, weights = load_own(path)
        heads = info.config.model.n_attention_heads
        if n_attention_heads not in (None, heads):
            raise CheckpointError(f"{path} has {heads} attention heads, not {n_attention_heads}")
    model = build(info.config.model, weights, path)
    return Classifier(model.eval().to(chosen), info.config, info.classes, str(path))


def load_own(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Load what Vitrine wrote: a file, a checkpoint folder, or a run folder."""
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such model; give a run folder, a checkpoint folder, a .safetensors file "
            "or a .pt file of the reference system"
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: not a model file: give .safetensors or .pt")
        return load_weights_file(path)
    folder = read_pointer(path / "checkpoints", "BEST") if (path / "checkpoints").is_dir() else path
    return load_info(folder), load_weights(folder)


def load_reference(
    path: Path, n_attention_heads: int | None
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Load a state dict of the reference system. Only tensors are unpickled, never code."""
    refuse_packed(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a sound file of weights: {reason:.100}") from error
    if not isinstance(state, dict) or not all(map(is_plain, state.keys(), state.values())):
        raise CheckpointError(f"{path}: not a state dict of plain tensors")
    if not is_reference(state):
        raise CheckpointError(
            f"{path}: not the reference system's weights: first keys {list(state)[:3]}"
        )
    model, weights = convert_reference(state, n_attention_heads=n_attention_heads)
    known = model.n_classes == len(CIFAR10_CLASSES)
    classes = CIFAR10_CLASSES if known else tuple(f"class {i}" for i in range(model.n_classes))
    config = Config(model=model, data=DataConfig(dataset="cifar10"))
    return CheckpointInfo(config, classes, {}, {}), weights


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
        if code.name in ("GLOBAL", "INST") and len(argument) > LONGEST_GLOBAL:
            raise CheckpointError(f"{path}: refused: it would run {argument:.40}…")


def is_plain(name: object, tensor: object) -> bool:
    """Tell whether a tensor is dense, in memory, and backed by as many numbers as it shows."""
    return (
        isinstance(name, str)
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def build(config: ModelConfig, weights: dict[str, Tensor], path: Path) -> VisionTransformer:
    """Return the model with these weights. Nothing is drawn, so no generator is moved.

    The file's own claims are held against its weights before anything of their size is made.
    """
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != config.n_layers:
        raise CheckpointError(f"{path}: {len(blocks)} layers, but it claims {config.n_layers}")
    with torch.device("meta"):
        model = VisionTransformer(config)
    fit_weights(model, weights, path)
    return model


def fit_weights(model: VisionTransformer, weights: dict[str, Tensor], path: Path) -> None:
    """Put weights into the model they describe, or name the first that do not fit."""
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(weights))
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if wrong:
        raise CheckpointError(f"{path}: weights do not fit the model they describe: {wrong[:3]}")
    strange = [name for name, tensor in weights.items() if not tensor.is_floating_point()]
    if strange:
        raise CheckpointError(f"{path}: weights are no floating-point numbers: {strange[:3]}")
    model.load_state_dict({name: t.to(torch.float32) for name, t in weights.items()}, assign=True)


def newest_run(output_path: Path) -> Path:
    """Return the run folder whose best checkpoint is the newest.

    Raises:
        CheckpointError: there is none.
    """
    pointers = sorted(output_path.glob("*/checkpoints/BEST"), key=lambda path: path.stat().st_mtime)
    if not pointers:
        raise CheckpointError(
            f"no trained model in {output_path}: train one (vitrine train --preset quick) or give "
            "--model_path"
        )
    return pointers[-1].parent.parent


def with_data(classifier: Classifier, **changes: object) -> Classifier:
    """Return the classifier with other settings of its data, e.g. ``fit``."""
    data = dataclasses.replace(classifier.config.data, **changes)  # type: ignore[arg-type]
    config = dataclasses.replace(classifier.config, data=data)
    return dataclasses.replace(classifier, config=config)
