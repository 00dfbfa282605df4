"""Vitrail: a Vision Transformer for small images.

    classifier = vitrail.load("output/quick")
    classifier.predict("cat.png")

Public names are loaded on first use, so that importing the package is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.config.presets import get_preset
    from vitrail.config.settings import Config, ModelConfig
    from vitrail.errors import VitrailError
    from vitrail.inference.classifier import Classifier
    from vitrail.inference.predictions import Prediction
    from vitrail.model.vit import VisionTransformer
    from vitrail.training.run import Run
    from vitrail.weights.pretrained import load

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Config",
    "ModelConfig",
    "Prediction",
    "Run",
    "VisionTransformer",
    "VitrailError",
    "get_preset",
    "load",
]

_HOMES = {
    "Classifier": "vitrail.inference.classifier",
    "Config": "vitrail.config.settings",
    "ModelConfig": "vitrail.config.settings",
    "Prediction": "vitrail.inference.predictions",
    "Run": "vitrail.training.run",
    "VisionTransformer": "vitrail.model.vit",
    "VitrailError": "vitrail.errors",
    "get_preset": "vitrail.config.presets",
    "load": "vitrail.weights.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
