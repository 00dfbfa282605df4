"""How checkpoints and weights files are written, verified and read: atomic, hashed, versioned.

    checkpoints/
    ├── LAST, BEST               one line each: the name of a folder beside them
    └── step-0000390/
        ├── checkpoint.json      settings, classes, step, metrics, versions, and the sha256 of the
        │                        other files and of itself
        ├── model.safetensors    the weights used for prediction (the moving average, if any)
        └── training.safetensors what only resuming needs: optimizer states, raw weights

A folder is written under a temporary name, flushed, and renamed, so a folder with its final name is
complete. No file contains code, and a changed byte is detected by its hash. The hashes protect
against accidents, not against an attacker who can recompute them.
"""

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from vitrail.config.files import from_json, to_json
from vitrail.config.settings import Config
from vitrail.errors import CheckpointError, ConfigError, OutputError
from vitrail.runtime.files import flush_folder, replace_file, write_flushed

FORMAT = 1
INFO, MODEL, TRAINING = "checkpoint.json", "model.safetensors", "training.safetensors"
METADATA_KEY = "vitrail"
STEP = re.compile(r"step-(\d{1,20})", re.ASCII)
"""Name of a checkpoint folder."""
LONGEST_NAME = 255
"""Maximum length of a class name: that of a folder name."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint: all that test, predict and explain need besides weights."""

    config: Config
    classes: tuple[str, ...]
    numbers: Mapping[str, Any]
    metrics: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, including the versions of torch and Python."""
        return {
            "format": FORMAT,
            "config": to_json(self.config),
            "classes": list(self.classes),
            "numbers": dict(self.numbers),
            "metrics": dict(self.metrics),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }

    @classmethod
    def from_json(cls, content: Any, where: Path) -> "CheckpointInfo":
        """Parse and check the output of ``to_json``.

        Raises:
            CheckpointError: the content is invalid or has another format version.
        """
        if not isinstance(content, Mapping) or "format" not in content:
            raise CheckpointError(f"{where}: not a Vitrail checkpoint")
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{where}: format {content['format']!r}, but this version reads format {FORMAT}: "
                "install the version of vitrail that wrote it"
            )
        missing = {"config", "classes", "numbers", "metrics"} - set(content)
        if missing:
            raise CheckpointError(f"{where}: missing {', '.join(sorted(missing))}")
        classes = content["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise CheckpointError(f"{where}: classes is not a list of names")
        if max(map(len, classes), default=0) > LONGEST_NAME:
            raise CheckpointError(f"{where}: a class name has more than {LONGEST_NAME} characters")
        for name in ("numbers", "metrics"):
            if not isinstance(content[name], Mapping):
                raise CheckpointError(f"{where}: {name} is not an object")
        try:
            config = from_json(content["config"])
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from error
        if config.model.n_classes != len(classes):
            raise CheckpointError(
                f"{where}: {len(classes)} class names for {config.model.n_classes} classes"
            )
        return cls(config, tuple(classes), content["numbers"], content["metrics"])


def save_checkpoint(
    folder: Path,
    info: CheckpointInfo,
    *,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint folder atomically.

    Raises:
        OutputError: it cannot be written (no space, no permission).
    """
    files = {MODEL: pack(weights), TRAINING: pack(training)}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[INFO] = seal({**info.to_json(), "sha256": hashes}).encode()
    partial, old = (folder.with_name(f".{word}-{folder.name}") for word in ("partial", "old"))
    try:
        remove_folders(partial)
        partial.mkdir(parents=True)
        for name, content in files.items():
            write_flushed(partial / name, content)
        flush_folder(partial)
        _rename_into_place(partial, folder, old)
        flush_folder(folder.parent)
    except OSError as error:
        raise OutputError(f"{folder}: cannot save the checkpoint: {error.strerror}") from error
    finally:
        remove_folders(partial)


def _rename_into_place(partial: Path, folder: Path, old: Path) -> None:
    """Rename ``partial`` to ``folder``; a previous folder is removed, or restored on failure."""
    if folder.exists():
        remove_folders(old)
        folder.rename(old)
    try:
        partial.rename(folder)
    finally:
        if folder.exists():
            remove_folders(old)
        elif old.exists():
            old.rename(folder)


def load_info(folder: Path) -> CheckpointInfo:
    """Read the description of a checkpoint.

    Raises:
        CheckpointError: it is missing, corrupt, not ours, or in a folder with another step's name.
    """
    info = CheckpointInfo.from_json(_read_info(folder), folder / INFO)
    if step_of(folder) not in (None, info.numbers.get("step")):
        raise CheckpointError(f"{folder / INFO}: its step does not match the folder name")
    return info


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint folder; None for other names."""
    match = STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read and verify the weights used for prediction.

    Raises:
        CheckpointError: the file is missing, truncated or modified.
    """
    return _read_tensors(folder, MODEL)


def load_training(folder: Path) -> dict[str, Tensor]:
    """Read and verify the tensors that only resuming needs.

    Raises:
        CheckpointError: the file is missing, truncated or modified.
    """
    return _read_tensors(folder, TRAINING)


def save_weights_file(path: Path, info: CheckpointInfo, weights: Mapping[str, Tensor]) -> None:
    """Write one self-describing ``.safetensors`` file.

    Raises:
        OutputError: it cannot be written.
    """
    described = seal({**info.to_json(), "sha256": hash_tensors(weights)})
    replace_file(path, pack(weights, {METADATA_KEY: described}))


def load_weights_file(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Read a file written by ``save_weights_file``.

    Raises:
        CheckpointError: it is missing, corrupt, or does not describe its model.
    """
    file = read_bytes(path)
    tensors = unpack(file, path)
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    described = (header.get("__metadata__") or {}).get(METADATA_KEY)
    if described is None:
        raise CheckpointError(f"{path}: not written by vitrail: it does not describe its model")
    content = _unseal(described, path)
    if content.get("sha256") != hash_tensors(tensors):
        raise CheckpointError(f"{path}: checksum mismatch: the weights were modified")
    return CheckpointInfo.from_json(content, path), tensors


def describes_itself(path: Path) -> bool:
    """Return whether a ``.safetensors`` file was written by ``save_weights_file``."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return METADATA_KEY in header["__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError, RecursionError):
        return False


def write_pointer(checkpoints: Path, name: str, target: Path) -> None:
    """Let LAST or BEST point to a checkpoint folder."""
    replace_file(checkpoints / name, f"{target.name}\n".encode())


def read_pointer(checkpoints: Path, name: str) -> Path:
    """Return the checkpoint folder that LAST or BEST points to.

    Raises:
        CheckpointError: the pointer is missing, or its target does not exist.
    """
    text = read_bytes(checkpoints / name).decode(errors="replace").strip()
    target = text.partition(" ")[0]  # older versions wrote a hash after the name
    if not STEP.fullmatch(target) or not (checkpoints / target).is_dir():
        raise CheckpointError(
            f"{checkpoints / name}: points to {target!r:.60}, which is not a checkpoint"
        )
    return checkpoints / target


def _read_info(folder: Path) -> dict[str, Any]:
    """Return the verified content of checkpoint.json."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    return _unseal(read_bytes(folder / INFO), folder / INFO)


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one file of tensors and compare its hash with the one in checkpoint.json."""
    hashes = _read_info(folder).get("sha256")
    content = read_bytes(folder / name)
    digest = hashlib.sha256(content).hexdigest()
    if not isinstance(hashes, dict) or hashes.get(name) != digest:
        raise CheckpointError(
            f"{folder / name}: checksum mismatch: modified or truncated (sha256 {digest[:16]}…)"
        )
    return unpack(content, folder / name)


def remove_folders(*folders: Path) -> None:
    """Remove folders if they exist."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


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


def seal(content: dict[str, Any]) -> str:
    """Return JSON text that contains its own hash."""
    return json.dumps({**content, "seal": _hash_json(content)}, indent=1)


def _unseal(text: str | bytes, where: Path) -> dict[str, Any]:
    """Return the content given to ``seal`` if its hash is right."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number too long
        raise CheckpointError(f"{where}: corrupt: {error}") from error
    if not isinstance(content, dict) or "seal" not in content:
        raise CheckpointError(f"{where}: not a Vitrail checkpoint")
    if content.pop("seal") != _hash_json(content):
        raise CheckpointError(f"{where}: checksum mismatch: the file was modified or is corrupt")
    return content


def _hash_json(content: Any) -> str:
    """Return the sha256 of a JSON value, regardless of its formatting."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors, regardless of their order."""
    return hashlib.sha256(pack(dict(sorted(tensors.items())))).hexdigest()


def read_bytes(path: Path) -> bytes:
    """Read a whole file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
