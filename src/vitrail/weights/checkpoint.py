"""Writes and reads checkpoints and weights files, atomically and with checksums.

    checkpoints/
    ├── LAST, BEST               one line each: the name of a folder beside them
    └── step-0000390/
        ├── checkpoint.json      settings, classes, step, metrics, versions, and the sha256 of the
        │                        other files
        ├── model.safetensors    the weights used for prediction (the moving average, if any)
        └── training.safetensors what only resuming needs: optimizer states, raw weights

A folder is written under a temporary name, flushed, and renamed, so a folder with its final name is
complete. No file contains code. The checksums detect accidents, not an attacker.
"""

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from vitrail.config.files import from_json, replace_fields, to_json
from vitrail.config.settings import Config
from vitrail.errors import CheckpointError, ConfigError, OutputError
from vitrail.evaluation.calibration import UNCALIBRATED, Calibration
from vitrail.inference.predictions import check_classes
from vitrail.runtime.files import flush_folder, replace_file, write_flushed

FORMAT = 1
INFO, MODEL, TRAINING = "checkpoint.json", "model.safetensors", "training.safetensors"
METADATA_KEY = "vitrail"
STEP = re.compile(r"step-(\d{1,20})", re.ASCII)
"""Name of a checkpoint folder."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint: all that test, predict and explain need besides weights."""

    config: Config
    classes: tuple[str, ...]
    numbers: Mapping[str, Any]
    metrics: Mapping[str, Any]
    calibration: Calibration = UNCALIBRATED
    """Fitted at the end of a run, to its best checkpoint; the default elsewhere."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, including the versions of torch and Python."""
        return {
            "format": FORMAT,
            "config": to_json(self.config),
            "classes": list(self.classes),
            "numbers": dict(self.numbers),
            "metrics": dict(self.metrics),
            "calibration": asdict(self.calibration),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: Path) -> "CheckpointInfo":
        """Parse and check the output of ``to_json``."""
        if "format" not in content:
            raise CheckpointError(f"{where}: not a Vitrail checkpoint")
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{where}: format {content['format']!r}, but this version reads format {FORMAT}: "
                "install the version of vitrail that wrote it"
            )
        missing = {"config", "classes", "numbers", "metrics"} - set(content)
        if missing:
            raise CheckpointError(f"{where}: missing {', '.join(sorted(missing))}")
        for name in ("numbers", "metrics", "calibration"):
            if not isinstance(content.get(name, {}), Mapping):
                raise CheckpointError(f"{where}: {name} is not an object")
        try:
            config = from_json(content["config"])
            fitted = {k: v for k, v in content.get("calibration", {}).items() if k != "energies"}
            calibration = replace_fields(UNCALIBRATED, fitted)  # energies: from older versions
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from error
        width = len(calibration.subspace[0])
        if width not in (0, config.model.pooled_dim):
            raise CheckpointError(
                f"{where}: the calibration is for {width} features, but the model has "
                f"{config.model.pooled_dim}: fit it again"
            )
        classes = check_classes(content["classes"], config, where)
        return cls(config, classes, content["numbers"], content["metrics"], calibration)


# --- folders --------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    info: CheckpointInfo,
    *,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint folder atomically."""
    files = {MODEL: pack(weights), TRAINING: pack(training)}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[INFO] = json.dumps({**info.to_json(), "sha256": hashes}, indent=1).encode()
    partial, old = (folder.with_name(f".{word}-{folder.name}") for word in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in files.items():
            write_flushed(partial / name, content)
        flush_folder(partial)
        if folder.exists():  # the run went back to an earlier checkpoint and is here again
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        flush_folder(folder.parent)
    except OSError as error:
        raise OutputError(f"{folder}: cannot save the checkpoint: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Add what was fitted to a checkpoint's weights to its description."""
    content = read_json_object(folder / INFO) | {"calibration": asdict(calibration)}
    replace_file(folder / INFO, json.dumps(content, indent=1).encode())


def load_info(folder: Path) -> CheckpointInfo:
    """Read the description of a checkpoint, which must be that of the step in its folder's name."""
    info = CheckpointInfo.from_json(read_json_object(folder / INFO), folder / INFO)
    if step_of(folder) not in (None, info.numbers.get("step")):
        raise CheckpointError(f"{folder / INFO}: its step does not match the folder name")
    return info


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read and verify the weights used for prediction."""
    return _read_tensors(folder, MODEL)


def load_training(folder: Path) -> dict[str, Tensor]:
    """Read and verify the tensors that only resuming needs."""
    return _read_tensors(folder, TRAINING)


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one file of tensors and compare its hash with the one in checkpoint.json."""
    hashes = read_json_object(folder / INFO).get("sha256")
    content = read_bytes(folder / name)
    if not isinstance(hashes, dict) or hashes.get(name) != hashlib.sha256(content).hexdigest():
        raise CheckpointError(f"{folder / name}: checksum mismatch: modified or truncated")
    return unpack(content, folder / name)


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint folder; None for other names."""
    match = STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def write_pointer(checkpoints: Path, name: str, target: Path) -> None:
    """Let LAST or BEST point to a checkpoint folder."""
    replace_file(checkpoints / name, f"{target.name}\n".encode())


def read_pointer(checkpoints: Path, name: str) -> Path:
    """Return the checkpoint folder that LAST or BEST points to, if it exists."""
    text = read_bytes(checkpoints / name).decode(errors="replace")
    target = text.partition(" ")[0].strip()  # older versions wrote a hash after the name
    if not STEP.fullmatch(target) or not (checkpoints / target).is_dir():
        raise CheckpointError(
            f"{checkpoints / name}: points to {target!r:.60}, which is not a checkpoint"
        )
    return checkpoints / target


# --- single files ---------------------------------------------------------------------------------


def save_weights_file(path: Path, info: CheckpointInfo, weights: Mapping[str, Tensor]) -> None:
    """Write one self-describing ``.safetensors`` file."""
    described = json.dumps({**info.to_json(), "sha256": hash_tensors(weights)})
    replace_file(path, pack(weights, {METADATA_KEY: described}))


def load_weights_file(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Read a file written by ``save_weights_file``."""
    tensors = unpack(read_bytes(path), path)
    with safe_open(path, "pt") as file:
        described = (file.metadata() or {}).get(METADATA_KEY)
    if described is None:
        raise CheckpointError(f"{path}: not written by vitrail: it does not describe its model")
    content = _parse_json_object(described, path)
    if content.get("sha256") != hash_tensors(tensors):
        raise CheckpointError(f"{path}: checksum mismatch: the weights were modified")
    return CheckpointInfo.from_json(content, path), tensors


def describes_itself(path: Path) -> bool:
    """Return whether a file was written by ``save_weights_file``."""
    try:
        with safe_open(path, "pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors, regardless of their order."""
    return hashlib.sha256(pack(dict(sorted(tensors.items())))).hexdigest()


def pack(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return tensors as the bytes of a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return bytes(save_safetensors(plain, metadata))


def unpack(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        return dict(load_safetensors(content))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error


def read_bytes(path: Path) -> bytes:
    """Read a whole file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    return _parse_json_object(read_bytes(path), path)


def _parse_json_object(text: str | bytes, where: Path) -> dict[str, Any]:
    """Return the object in a JSON text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # wrong JSON or UTF-8, a number too long
        raise CheckpointError(f"{where}: corrupt: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: not a JSON object")
    return content
