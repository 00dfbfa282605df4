"""Vitrail: a Vision Transformer for small images.

    classifier = vitrail.load("output/quick")
    classifier.predict("cat.png")

Public names are loaded on first use, so that importing the package is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.config.presets import get_preset as get_preset
    from vitrail.config.settings import Config as Config
    from vitrail.config.settings import ModelConfig as ModelConfig
    from vitrail.errors import VitrailError as VitrailError
    from vitrail.inference.classifier import Classifier as Classifier
    from vitrail.inference.predictions import Prediction as Prediction
    from vitrail.model.vit import VisionTransformer as VisionTransformer
    from vitrail.training.from_python import train as train
    from vitrail.training.run import Run as Run
    from vitrail.weights.pretrained import load as load

__version__ = "0.1.0"

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
    "train": "vitrail.training.from_python",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
