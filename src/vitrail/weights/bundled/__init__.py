"""The models included in the package: NAME.safetensors and its card, NAME.json, in this folder."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
DEFAULT = "cifar10"
"""The model that is used if none is named and none was trained."""


@dataclass(frozen=True)
class Card:
    """What a bundled model was trained on, how, and how accurate it is on which split.

    ``recipe`` is the preset with the settings that differ from it; ``record`` is the folder of the
    repository that documents the run. Without validation images, there is no accuracy on them.
    """

    data: str
    recipe: str
    test_accuracy: float
    validation_accuracy: float | None
    parameters: int
    record: str


@cache
def names() -> tuple[str, ...]:
    """Return the names of the bundled models."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def weights_path(name: str) -> Path:
    """Return the file of a bundled model."""
    return FOLDER / f"{name}.safetensors"


def read_card(name: str) -> Card:
    """Return the card of a bundled model."""
    return Card(**json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
