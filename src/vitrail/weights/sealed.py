"""Tensors and JSON as bytes that tell whether they were changed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from vitrail.errors import CheckpointError


def pack(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return tensors as the bytes of a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return bytes(save_safetensors(plain, metadata))


def unpack(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        return dict(load_safetensors(content))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a sound safetensors file: {error}") from error


def seal(content: dict[str, Any]) -> str:
    """Return JSON text that holds its own hash."""
    return json.dumps({**content, "seal": digest_json(content)}, indent=1)


def unseal(text: str | bytes, where: Path) -> dict[str, Any]:
    """Return what seal() was given, if it is unchanged."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number without end
        raise CheckpointError(f"{where}: damaged: {error}") from error
    if not isinstance(content, dict) or "seal" not in content:
        raise CheckpointError(f"{where}: not a Vitrail checkpoint")
    if content.pop("seal") != digest_json(content):
        raise CheckpointError(f"{where}: altered: its content has another sha256 than it says")
    return content


def digest_json(content: Any) -> str:
    """Return the sha256 of a JSON value, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors, in any order."""
    return hashlib.sha256(pack(dict(sorted(tensors.items())))).hexdigest()


def read_bytes(path: Path) -> bytes:
    """Read a whole file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
