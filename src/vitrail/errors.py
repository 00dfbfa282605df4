"""Vitrail's exceptions, and the import of optional libraries, with the remedy if it fails.

The library raises them; only the CLI turns them into exit codes.
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class VitrailError(Exception):
    """Base class. The message is one line for the user: what is wrong, its value, the remedy.

    Names of files, classes and settings can come from untrusted files, so the message is stripped
    of characters that could break the line or send commands to a terminal.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ConfigError(VitrailError):
    """An invalid setting or argument."""


class DataError(VitrailError):
    """A dataset that is missing, corrupt or in the wrong format."""


class PictureError(DataError):
    """An image file that cannot be read."""


class CheckpointError(VitrailError):
    """Weights that are missing, truncated, modified or from another model."""


class OutputError(VitrailError):
    """A folder or file that cannot be written."""


class ExportError(VitrailError):
    """An exported file whose outputs differ from the model's."""


class TrainingError(VitrailError):
    """Training that cannot continue, e.g. after a loss that is not finite."""


def printable(text: str) -> str:
    """Return the text with control and invisible characters replaced by U+FFFD."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its period, or the error's type."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


SYNONYMS = {
    "lr": "learning_rate", "min_lr": "minimum_learning_rate", "bs": "batch_size",
    "batch": "batch_size", "wd": "weight_decay", "n_epochs": "epochs", "num_epochs": "epochs",
    "opt": "optimizer", "scheduler": "schedule", "warmup": "warmup_epochs", "amp": "precision",
    "ema": "ema_decay", "smoothing": "label_smoothing", "clip_grad": "clip_norm",
    "grad_clip": "clip_norm", "pretrained": "init", "finetune": "init", "depth": "n_layers",
    "layers": "n_layers", "num_layers": "n_layers", "heads": "n_attention_heads",
    "num_heads": "n_attention_heads", "dim": "embed_dim", "hidden_size": "embed_dim",
    "mlp_ratio": "forward_mul", "num_classes": "n_classes", "img_size": "image_size",
    "imgsz": "image_size", "resolution": "image_size", "workers": "num_workers",
    "data": "data_path", "data_dir": "data_path", "root": "data_path", "output": "output_path",
    "output_dir": "output_path", "out": "output_path", "name": "folder_name",
    "weights": "model_path", "checkpoint": "model_path", "ckpt": "model_path", "topk": "top_k",
}  # fmt: skip
"""Names of settings in other libraries -> the names here."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word most similar to ``word``, or ''."""
    known = list(known)
    name = word.removeprefix("--")
    synonym = word.removesuffix(name) + SYNONYMS.get(name, "")
    close = [synonym] if synonym in known else difflib.get_close_matches(word[:100], known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


EXTRAS = {
    "datasets": "hf",
    "huggingface_hub": "hub",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "optuna": "sweep",
    "starlette": "serve",
    "tensorboard": "track",
    "uvicorn": "serve",
}
"""The extra that installs a library. Libraries without an extra are installed by the user."""


def import_optional(module: str) -> ModuleType:
    """Return a module of an optional library.

    Raises:
        ConfigError: the library is not installed (the message says how to) or broken.
    """
    library = module.partition(".")[0]
    wanted = f'-e ".[{EXTRAS[library]}]"' if library in EXTRAS else library
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == library:
            raise ConfigError(f"{library} is not installed: pip install {wanted}") from error
        raise ConfigError(
            f"{library} lacks {error.name}: pip install --force-reinstall {wanted}"
        ) from error
    except ImportError as error:
        raise ConfigError(f"{library} cannot be imported: {error}") from error
