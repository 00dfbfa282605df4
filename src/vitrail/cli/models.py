"""How every command names a model, and says how its pictures are prepared."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from vitrail.cli.console import say
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from vitrail.inference.classifier import Classifier


@dataclass(frozen=True)
class Preparation:
    """How pictures are prepared for a model, where its files do not say it or say it wrongly."""

    mean: tuple[float, float, float] | None = None
    """Per-channel mean that is subtracted, pixels scaled to 0..1. Default: as the weights say."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation that is divided by. Default: as the weights say."""
    fit: Literal["crop", "pad", "squash"] | None = None
    """Fit pictures of another shape by cropping, padding or stretching. Default: as the weights
    say."""
    interpolation: Literal["bilinear", "bicubic", "lanczos", "hamming", "box", "nearest"] | None = (
        None
    )
    """Filter that resizes pictures. Default: as the weights say."""
    crop_pct: float | None = None
    """Share of each side that is kept around the center. Default: as the weights say."""
    pixel_range: tuple[float, float] | None = None
    """Values of black and white in 16-bit and floating-point pictures. Default: as the weights say,
    else from the pictures."""

    def given(self) -> dict[str, Any]:
        """Return what was given, by the names of DataConfig's fields."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ModelOptions:
    """Which model, where it computes, and how its pictures are prepared."""

    model_path: str | None = None
    """Run folder, weights, bundled name or hf:OWNER/NAME. Default: the newest run, else the
    bundled model. A path that could be a name starts with ./"""
    n_attention_heads: int | None = None
    """Number of attention heads, for weights whose files do not say it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, then mps, then cpu."""
    preparation: Preparation = field(default_factory=Preparation)


@dataclass(frozen=True)
class ModelWord(ModelOptions):
    """The same for commands whose only word is the model."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """As --model_path."""


Options = TypeVar("Options", bound=ModelWord)


def with_word(options: Options) -> Options:
    """Return the options with the model's word as --model_path.

    Raises:
        ConfigError: both name a model.
    """
    if options.model is None:
        return options
    if options.model_path not in (None, options.model):
        raise ConfigError(
            f"two models are named, {options.model} and --model_path {options.model_path}: give one"
        )
    return dataclasses.replace(options, model_path=options.model)


def load_model(options: ModelOptions, runs: Path = Path("output")) -> "Classifier":
    """Load the model that was named, or the newest run, saying which.

    Raises:
        ConfigError: the model is an ONNX file, which only ``vitrail predict`` runs.
    """
    if is_onnx(options.model_path):
        raise ConfigError(
            f"{options.model_path}: an ONNX file can only predict (vitrail predict): give the run "
            "folder or weights that it was exported from"
        )
    from vitrail.weights.pretrained import default_model, load

    path: Path | str | None = options.model_path
    if path is None:
        path = default_model(runs)
        what = "newest run" if isinstance(path, Path) else "bundled model"
        say(f"no --model_path given: taking the {what}, {path}")
    given = options.preparation.given()
    model = load(path, n_attention_heads=options.n_attention_heads, device=options.device, **given)
    for note in model.notes:
        say(f"{path}: {note}")
    return model


def is_onnx(path: str | None) -> bool:
    """Return whether a model is an ONNX file, which runs without torch."""
    return path is not None and path.lower().endswith(".onnx")
