"""The Hugging Face hub: folders of models, down and up. What is in them is not known here.

The token is ``huggingface_hub``'s own affair (``hf auth login``, or HF_TOKEN): it is never read,
printed or stored here.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitrail.errors import CheckpointError, OutputError, VitrailError
from vitrail.optional import import_optional

PREFIX = "hf:"
"""What a hub id begins with wherever a model is named, so that it is never taken for a path."""
HTTP_LIBRARIES = ("httpx", "httpx2")
"""What huggingface_hub talks by, from its versions 1 and 2 on."""
WANTED = ["config.json", "preprocessor_config.json", "model.safetensors"]
"""The files of a model that are downloaded; any other (there may be many) is not."""


def is_hub_id(source: str | Path) -> bool:
    """Tell whether a model's name is one of the hub, not of a file or folder."""
    return str(source).startswith(PREFIX)


def download(hub_id: str) -> Path:
    """Return the folder that holds a model of the hub, downloaded unless it is there already.

    Args:
        hub_id: ``hf:OWNER/NAME``, or ``hf:OWNER/NAME@REVISION`` (a branch, tag or commit).

    Raises:
        ConfigError: huggingface_hub is not installed.
        CheckpointError: there is no such model, or it cannot be reached and was not kept.
    """
    name, _, revision = hub_id.removeprefix(PREFIX).partition("@")
    api = hub_api()
    with worded(hub_id, CheckpointError):
        return Path(api.snapshot_download(name, revision=revision or None, allow_patterns=WANTED))


def upload(folder: Path, hub_id: str, *, private: bool = False) -> str:
    """Put a folder's files on the hub as one commit, and return the model's address.

    Raises:
        ConfigError: huggingface_hub is not installed.
        OutputError: the hub refuses, or cannot be reached.
    """
    name, api = hub_id.removeprefix(PREFIX), hub_api()
    with worded(hub_id, OutputError):
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
def worded(hub_id: str, kind: type[VitrailError]) -> Iterator[None]:
    """Turn an exception of the hub's client into one line."""
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
        raise kind(f"{hub_id}: {explain(error)}") from error


def explain(error: Exception) -> str:
    """Return what went wrong, as one line."""
    hints = {
        "RepositoryNotFoundError": "no such model on the hub, or it is private: hf auth login",
        "GatedRepoError": "its owner wants to be asked first: open its page on the hub",
        "RevisionNotFoundError": "the model has no such revision",
        "LocalEntryNotFoundError": "the hub cannot be reached and the model was not kept earlier",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and the model was not kept earlier",
        "LocalTokenNotFoundError": "the hub wants to know you: hf auth login",
        "HFValidationError": "not a hub id: give OWNER/NAME",
        "ConnectError": "the hub cannot be reached",
    }
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "the hub does not let you: hf auth login, with a token that may write"
    for kind in type(error).__mro__:
        if kind.__name__ in hints:
            return hints[kind.__name__]
    words = str(error).strip().splitlines()
    return words[0] if words else type(error).__name__
