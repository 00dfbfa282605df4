"""Probabilities -> each picture's most probable classes. No torch here: ONNX files need none."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vitrail.errors import ConfigError, printable

SHOWN = 50
"""Pictures whose predictions a notebook shows; of the rest it shows the number."""


class Prediction(NamedTuple):
    """One class and how probable the model finds it."""

    name: str
    probability: float


class Ranking(list[Prediction]):
    """The most probable classes of one picture: a list, which a notebook shows as bars."""

    def _repr_html_(self) -> str:
        return f"<table>{''.join(map(bar, self))}</table>"


class Rankings(list[list[Prediction]]):
    """The rankings of several pictures: a list, which a notebook shows as a table of bars."""

    def _repr_html_(self) -> str:
        rows = []
        for number, ranking in enumerate(self[:SHOWN]):
            if len(self) > 1:
                rows.append(f'<tr><th colspan="3" style="text-align:left">[{number}]</th></tr>')
            rows += map(bar, ranking)
        more = f"<p>and {len(self) - SHOWN:,} more pictures</p>" if len(self) > SHOWN else ""
        return f"<table>{''.join(rows)}</table>{more}"


def bar(prediction: Prediction) -> str:
    """Return a row of a table: the class, a bar as long as it is probable, and the percentage."""
    name = html.escape(printable(prediction.name))
    width = f"{160 * prediction.probability:.0f}px"
    return (
        f'<tr><td style="text-align:left">{name}</td>'
        '<td style="text-align:left"><div style="width:160px;background:#8884">'
        f'<div style="width:{width};height:0.9em;background:#4a7fb5"></div></div></td>'
        f'<td style="text-align:right">{prediction.probability:.1%}</td></tr>'
    )


def rank(
    probabilities_BY: np.ndarray, classes: Sequence[str], top_k: int
) -> list[list[Prediction]]:
    """Return for each picture its ``top_k`` most probable classes, the most probable first.

    Raises:
        ConfigError: top_k is not a whole number, or below 1.
    """
    if not isinstance(top_k, int | np.integer):
        raise ConfigError(f"top_k is {top_k!r:.60}: give a whole number")
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}: give at least 1")
    order_BK = np.argsort(-probabilities_BY, axis=1, kind="stable")[:, :top_k]
    return Rankings(
        Ranking(Prediction(classes[y], float(probabilities_Y[y])) for y in order_K)
        for probabilities_Y, order_K in zip(probabilities_BY, order_BK, strict=True)
    )
