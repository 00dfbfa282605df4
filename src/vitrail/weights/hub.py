"""Downloads and uploads model folders of the Hugging Face Hub, whatever they contain.

The token is handled by ``huggingface_hub`` alone (``hf auth login``, or HF_TOKEN): it is never
read, printed or stored here.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitrail.errors import CheckpointError, OutputError, VitrailError
from vitrail.optional import import_optional

PREFIX = "hf:"
"""Prefix of a hub id wherever a model is named, to distinguish it from a path."""
HTTP_LIBRARIES = ("httpx", "httpx2")
"""HTTP libraries of huggingface_hub, from versions 1 and 2 on."""
WANTED = ["config.json", "preprocessor_config.json", "model.safetensors"]
"""The files of a model that are downloaded; all others are skipped."""


def is_hub_id(source: str | Path) -> bool:
    """Return whether a model's name is a hub id, not a file or folder."""
    return str(source).startswith(PREFIX)


def download(hub_id: str) -> Path:
    """Download a model of the hub unless it is cached, and return its folder.

    Args:
        hub_id: ``hf:OWNER/NAME``, or ``hf:OWNER/NAME@REVISION`` (a branch, tag or commit).

    Raises:
        ConfigError: huggingface_hub is not installed.
        CheckpointError: there is no such model, or the hub cannot be reached.
    """
    name, _, revision = hub_id.removeprefix(PREFIX).partition("@")
    api = hub_api()
    with _reported_as(hub_id, CheckpointError):
        return Path(api.snapshot_download(name, revision=revision or None, allow_patterns=WANTED))


def upload(folder: Path, hub_id: str, *, private: bool = False) -> str:
    """Upload a folder's files as one commit, and return the model's URL.

    Raises:
        ConfigError: huggingface_hub is not installed.
        OutputError: the upload is rejected, or the hub cannot be reached.
    """
    name, api = hub_id.removeprefix(PREFIX), hub_api()
    with _reported_as(hub_id, OutputError):
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a Vitrail model")
    return str(address)


def hub_api() -> Any:
    """Return the hub's client.

    Raises:
        ConfigError: it is not installed.
    """
    return import_optional("huggingface_hub").HfApi(library_name="vitrail")


@contextlib.contextmanager
def _reported_as(hub_id: str, kind: type[VitrailError]) -> Iterator[None]:
    """Convert exceptions of the hub's client to ours, with a message of one line."""
    from huggingface_hub import errors

    # A failed upload is a RuntimeError; connection errors are those of the HTTP library.
    libraries = [sys.modules[name] for name in HTTP_LIBRARIES if name in sys.modules]
    raised: tuple[Any, ...] = (
        OSError,
        RuntimeError,
        errors.HFValidationError,
        errors.EntryNotFoundError,
        errors.HfHubHTTPError,
        *(library.HTTPError for library in libraries),
    )
    try:
        yield
    except raised as error:
        raise kind(f"{hub_id}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """Return an error message of one line."""
    hints = {
        "RepositoryNotFoundError": "no such model on the hub, or it is private: hf auth login",
        "GatedRepoError": "gated repository: request access on its page on the hub",
        "RevisionNotFoundError": "the model has no such revision",
        "LocalEntryNotFoundError": "the hub cannot be reached and the model is not cached",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and the model is not cached",
        "LocalTokenNotFoundError": "not logged in: hf auth login",
        "HFValidationError": "not a hub id: give OWNER/NAME",
        "ConnectError": "the hub cannot be reached",
    }
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "permission denied: hf auth login, with a write token to push"
    for kind in type(error).__mro__:
        if kind.__name__ in hints:
            return hints[kind.__name__]
    words = str(error).strip().splitlines()
    return words[0] if words else type(error).__name__
