"""Training states and weights to and from folders: atomic, hashed, versioned.

    checkpoints/
    ├── LAST, BEST               one line each: the name of a folder beside them, and a hash
    └── step-0000390/
        ├── checkpoint.json      settings, classes, step, metrics, versions, and the sha256 of
        │                        the others and of itself
        ├── model.safetensors    the weights that predict (the moving average, where there is one)
        └── training.safetensors what only going on needs: optimizers, raw weights

A folder is written under another name, flushed, and renamed: what bears the name is whole. No file
holds code, and a changed byte is found by its hash. The hashes guard against accidents, not
against somebody who can write new ones.
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
from torch import Tensor

from vitrail.config.files import from_json, to_json
from vitrail.config.settings import Config
from vitrail.errors import CheckpointError, ConfigError, OutputError
from vitrail.runtime.files import flush_folder, replace_file, write_flushed
from vitrail.weights.sealed import hash_tensors, pack, read_bytes, seal, unpack, unseal

FORMAT = 1
INFO, MODEL, TRAINING = "checkpoint.json", "model.safetensors", "training.safetensors"
METADATA_KEY = "vitrail"
STEP = re.compile(r"step-\d{1,20}")
"""The name of a checkpoint folder."""
LONGEST_NAME = 255
"""Characters of a class name, as of a folder's."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself; all that test, predict and explain need besides weights."""

    config: Config
    classes: tuple[str, ...]
    numbers: Mapping[str, Any]
    metrics: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values, with the versions that wrote it."""
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
        """Read what to_json() gave, checking it.

        Raises:
            CheckpointError: it is something else, or of a newer format.
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
            raise CheckpointError(f"{where}: {', '.join(sorted(missing))} missing")
        classes = content["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise CheckpointError(f"{where}: classes are not a list of names")
        if max(map(len, classes), default=0) > LONGEST_NAME:
            raise CheckpointError(f"{where}: a class name of more than {LONGEST_NAME} characters")
        for name in ("numbers", "metrics"):
            if not isinstance(content[name], Mapping):
                raise CheckpointError(f"{where}: {name} are not a table")
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
    """Write a checkpoint folder, all of it or nothing.

    Raises:
        OutputError: it cannot be written (no space, no permission).
    """
    files = {MODEL: pack(weights), TRAINING: pack(training)}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[INFO] = seal({**info.to_json(), "sha256": hashes}).encode()
    partial, old = (folder.with_name(f".{word}-{folder.name}") for word in ("partial", "old"))
    try:
        clear(partial)
        partial.mkdir(parents=True)
        for name, content in files.items():
            write_flushed(partial / name, content)
        flush_folder(partial)
        put_in_place(partial, folder, old)
        flush_folder(folder.parent)
    except OSError as error:
        raise OutputError(f"{folder}: cannot save the checkpoint: {error.strerror}") from error
    finally:
        clear(partial)


def put_in_place(partial: Path, folder: Path, old: Path) -> None:
    """Give a folder its name; what had it before goes, but comes back if that fails."""
    if folder.exists():
        clear(old)
        folder.rename(old)
    try:
        partial.rename(folder)
    finally:
        if folder.exists():
            clear(old)
        elif old.exists():
            old.rename(folder)


def load_info(folder: Path) -> CheckpointInfo:
    """Read what the checkpoint says of itself.

    Raises:
        CheckpointError: it is missing, damaged, foreign, or bears the name of another one.
    """
    info = CheckpointInfo.from_json(read_info(folder), folder / INFO)
    if step_of(folder) not in (None, info.numbers.get("step")):
        raise CheckpointError(f"{folder / INFO}: tells another number of updates than its folder")
    return info


def step_of(folder: Path) -> int | None:
    """Return the number of updates that a checkpoint folder's name tells, if it is such a name."""
    match = re.fullmatch(r"step-(\d+)", folder.name, re.ASCII)
    return int(match[1]) if match else None


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights that predict, if their hash is right.

    Raises:
        CheckpointError: they are missing, truncated or altered.
    """
    return read_tensors(folder, MODEL)


def load_training(folder: Path) -> dict[str, Tensor]:
    """Read what going on needs besides the weights, if its hash is right.

    Raises:
        CheckpointError: it is missing, truncated or altered.
    """
    return read_tensors(folder, TRAINING)


def save_weights_file(path: Path, info: CheckpointInfo, weights: Mapping[str, Tensor]) -> None:
    """Write one self-describing ``.safetensors`` file.

    Raises:
        OutputError: it cannot be written.
    """
    described = seal({**info.to_json(), "sha256": hash_tensors(weights)})
    replace_file(path, pack(weights, {METADATA_KEY: described}))


def load_weights_file(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Read a file that save_weights_file() wrote.

    Raises:
        CheckpointError: it is missing, damaged, or does not describe itself.
    """
    file = read_bytes(path)
    tensors = unpack(file, path)
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    described = (header.get("__metadata__") or {}).get(METADATA_KEY)
    if described is None:
        raise CheckpointError(f"{path}: not written by vitrail: it does not describe its model")
    content = unseal(described, path)
    if content.get("sha256") != hash_tensors(tensors):
        raise CheckpointError(f"{path}: altered: the weights have another sha256 than it says")
    return CheckpointInfo.from_json(content, path), tensors


def describes_itself(path: Path) -> bool:
    """Tell whether a ``.safetensors`` file is one that save_weights_file() wrote."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return METADATA_KEY in header["__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError, RecursionError):
        return False


def write_pointer(checkpoints: Path, name: str, target: Path) -> None:
    """Let LAST or BEST name a checkpoint folder."""
    replace_file(checkpoints / name, f"{target.name} {sign(name, target.name)}\n".encode())


def sign(pointer: str, target: str) -> str:
    """Return a hash that tells a changed name, and LAST from BEST."""
    return hashlib.sha256(f"{pointer} {target}".encode()).hexdigest()[:16]


def read_pointer(checkpoints: Path, name: str) -> Path:
    """Return the checkpoint folder that LAST or BEST names.

    Raises:
        CheckpointError: there is no such pointer, it was altered, or it points at nothing.
    """
    text = read_bytes(checkpoints / name).decode(errors="replace").strip()
    target, space, signature = text.partition(" ")  # no hash where an older version wrote it
    if space and signature != sign(name, target):
        raise CheckpointError(f"{checkpoints / name}: altered: {text!r:.60}")
    if not STEP.fullmatch(target) or not (checkpoints / target).is_dir():
        raise CheckpointError(f"{checkpoints / name}: names {target!r:.60}, which is no checkpoint")
    return checkpoints / target


def read_info(folder: Path) -> dict[str, Any]:
    """Return the content of checkpoint.json."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    return unseal(read_bytes(folder / INFO), folder / INFO)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one file of tensors and hold its hash against checkpoint.json."""
    hashes = read_info(folder).get("sha256")
    content = read_bytes(folder / name)
    digest = hashlib.sha256(content).hexdigest()
    if not isinstance(hashes, dict) or hashes.get(name) != digest:
        raise CheckpointError(
            f"{folder / name}: altered or truncated: its sha256 is {digest[:16]}…"
        )
    return unpack(content, folder / name)


def clear(*folders: Path) -> None:
    """Remove folders that may be there or not."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
