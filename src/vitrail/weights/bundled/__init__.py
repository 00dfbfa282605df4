"""The models included in the package: NAME.safetensors and its card, NAME.json, in this folder."""

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
DEFAULT = "cifar10"
"""The model that is used if none is named and none was trained."""


@dataclass(frozen=True)
class Card:
    """What a bundled model is and how accurate it is."""

    data: str
    """What it was trained on."""
    recipe: str
    """The preset, and the settings that differ from it."""
    test_accuracy: float
    """Accuracy on the test split, without test-time augmentation."""
    validation_accuracy: float
    """Accuracy on the validation split, on which it was selected."""
    parameters: int
    """Number of learned parameters."""
    record: str
    """The folder of the repository that documents the run."""


def names() -> list[str]:
    """Return the names of the bundled models."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def weights_path(name: str) -> Path:
    """Return the file of a bundled model."""
    return FOLDER / f"{name}.safetensors"


def read_card(name: str) -> Card:
    """Return the card of a bundled model."""
    return Card(**json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
