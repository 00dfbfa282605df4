"""Probabilities -> what is told of a picture. No torch here: ONNX files are told of alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vitrine.errors import ConfigError


class Prediction(NamedTuple):
    """One class and how probable the model finds it."""

    name: str
    probability: float


def rank(
    probabilities_BY: np.ndarray, classes: Sequence[str], top_k: int
) -> list[list[Prediction]]:
    """Return for each picture its ``top_k`` most probable classes, the most probable first.

    Raises:
        ConfigError: top_k is below 1.
    """
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}: give at least 1")
    order_BK = np.argsort(-probabilities_BY, axis=1, kind="stable")[:, :top_k]
    return [
        [Prediction(classes[y], float(probabilities_Y[y])) for y in order_K]
        for probabilities_Y, order_K in zip(probabilities_BY, order_BK, strict=True)
    ]
