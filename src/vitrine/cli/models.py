"""How every command names a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vitrine.cli.console import say
from vitrine.errors import ConfigError

if TYPE_CHECKING:
    from vitrine.predict import Classifier


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it computes."""

    model_path: Path | None = None
    """Run folder, weights, bundled name or hf:OWNER/NAME; else the newest run, or bundled model."""
    n_attention_heads: int | None = None
    """Head count, for weights whose files do not tell it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, then mps, then cpu."""


def load_model(options: ModelOptions, runs: Path = Path("output")) -> "Classifier":
    """Load the model that was named, or the newest run, saying which.

    Raises:
        ConfigError: the model is an ONNX file, which only ``vitrine predict`` runs.
    """
    if is_onnx(options.model_path):
        raise ConfigError(
            f"{options.model_path}: an ONNX file can only predict (vitrine predict): give the run "
            "folder or weights that it was exported from"
        )
    from vitrine.pretrained import default_model, load

    path: Path | str | None = options.model_path
    if path is None:
        path = default_model(runs)
        what = "newest run" if isinstance(path, Path) else "bundled model"
        say(f"no --model_path given: taking the {what}, {path}")
    model = load(path, n_attention_heads=options.n_attention_heads, device=options.device)
    for note in model.notes:
        say(f"{path}: {note}")
    return model


def is_onnx(path: Path | None) -> bool:
    """Tell whether a model is named that ``vitrine.onnx_predict`` runs, without torch."""
    return path is not None and path.suffix.lower() == ".onnx"
