"""Vitrine: a Vision Transformer for small images.

    classifier = vitrine.load("output/quick")
    classifier.predict("cat.png")

The public names are loaded on first use, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrine.config import Config, ModelConfig
    from vitrine.errors import VitrineError
    from vitrine.model import VisionTransformer
    from vitrine.predict import Classifier, Prediction
    from vitrine.presets import get_preset
    from vitrine.pretrained import load
    from vitrine.run import Run

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Config",
    "ModelConfig",
    "Prediction",
    "Run",
    "VisionTransformer",
    "VitrineError",
    "get_preset",
    "load",
]

_HOMES = {
    "Classifier": "vitrine.predict",
    "Config": "vitrine.config",
    "ModelConfig": "vitrine.config",
    "Prediction": "vitrine.predict",
    "Run": "vitrine.run",
    "VisionTransformer": "vitrine.model",
    "VitrineError": "vitrine.errors",
    "get_preset": "vitrine.presets",
    "load": "vitrine.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
