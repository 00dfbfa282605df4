"""The exceptions Vitrail raises itself.

    VitrailError                 anything below; str(error) is one line for the user
    ├── ConfigError              a setting that cannot be: what, its value, the remedy
    ├── DataError                data missing, damaged or not what they claim to be
    │   └── PictureError         one picture file that cannot be read
    ├── CheckpointError          weights missing, truncated, altered or foreign
    ├── OutputError              a folder that cannot be written
    ├── ExportError              an exported file that does not compute what the model does
    └── TrainingError            training cannot go on (a loss that is not finite)

The library raises these; only the command line turns them into words and exit codes.
"""

import difflib
from collections.abc import Iterable


class VitrailError(Exception):
    """Base of all of Vitrail's own exceptions.

    Names of files, classes and settings come from strangers: in the message nothing is left of
    them that would break the line or command a terminal.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ConfigError(VitrailError):
    """A setting that cannot be."""


class DataError(VitrailError):
    """Data that are missing, damaged or not what they claim to be."""


class PictureError(DataError):
    """One picture file that cannot be read."""


class CheckpointError(VitrailError):
    """Weights that are missing, truncated, altered or foreign."""


class OutputError(VitrailError):
    """A folder or file that cannot be written."""


class ExportError(VitrailError):
    """An exported file that does not compute what the model does."""


class TrainingError(VitrailError):
    """Training that cannot go on."""


def printable(text: str) -> str:
    """Return the text with every control or invisible character shown as the replacement sign."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


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
"""What other systems call a setting: what it is called here."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word nearest to a mistyped one, or nothing."""
    known = list(known)
    name = word.removeprefix("--")
    synonym = word.removesuffix(name) + SYNONYMS.get(name, "")
    close = [synonym] if synonym in known else difflib.get_close_matches(word[:100], known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
