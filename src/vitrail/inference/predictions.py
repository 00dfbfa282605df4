"""What all classifiers share: pictures -> the most probable classes. Does not import torch."""

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitrail.config.settings import Config
from vitrail.data.formats import WHITE, Color
from vitrail.data.pictures import Pictures, framing, stack_pictures
from vitrail.errors import CheckpointError, ConfigError, printable
from vitrail.evaluation.calibration import Calibration, describe_unlike

SHOWN = 50
"""Number of pictures whose predictions a notebook shows."""


class Prediction(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


class Ranking(list[Prediction]):
    """The most probable classes of one picture: a list, which a notebook shows as bars."""

    familiarity: float | None = None
    """Share of validation images that are less like the training images; None if unknown."""

    @property
    def unlike(self) -> bool:
        """Whether the picture is unlike the training images."""
        return bool(describe_unlike(self.familiarity))

    def _repr_html_(self) -> str:
        return f"<table>{''.join(map(_html_row, self))}</table>"


class Rankings(list[Ranking]):
    """The rankings of several pictures: a list, which a notebook shows as a table of bars."""

    def _repr_html_(self) -> str:
        rows = []
        for number, ranking in enumerate(self[:SHOWN]):
            if len(self) > 1:
                rows.append(f'<tr><th colspan="3" style="text-align:left">[{number}]</th></tr>')
            rows += map(_html_row, ranking)
        more = f"<p>and {len(self) - SHOWN:,} more pictures</p>" if len(self) > SHOWN else ""
        return f"<table>{''.join(rows)}</table>{more}"


def _html_row(prediction: Prediction) -> str:
    """Return a table row: the class, a bar proportional to its probability, the percentage."""
    name = html.escape(printable(prediction.name))
    width = f"{160 * prediction.probability:.0f}px"
    return (
        f'<tr><td style="text-align:left">{name}</td>'
        '<td style="text-align:left"><div style="width:160px;background:#8884">'
        f'<div style="width:{width};height:0.9em;background:#4a7fb5"></div></div></td>'
        f'<td style="text-align:right">{prediction.probability:.1%}</td></tr>'
    )


def rank(probabilities_BY: np.ndarray, classes: Sequence[str], top_k: int) -> Rankings:
    """Return the ``top_k`` most probable classes of each picture, in descending order."""
    if not isinstance(top_k, int | np.integer):
        raise ConfigError(f"top_k is {top_k!r:.60}: give a whole number")
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}: give at least 1")
    order_BK = np.argsort(-probabilities_BY, axis=1, kind="stable")[:, :top_k]
    return Rankings(
        Ranking(Prediction(classes[y], float(probabilities_Y[y])) for y in order_K)
        for probabilities_Y, order_K in zip(probabilities_BY, order_BK, strict=True)
    )


def check_classes(names: object, config: Config, where: Path) -> tuple[str, ...]:
    """Return the class names stored with a model, after checking that their number is right."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: its classes are not a list of names")
    if len(names) != config.model.n_classes:
        raise CheckpointError(
            f"{where}: {len(names)} class names for {config.model.n_classes} classes"
        )
    return tuple(names)


class BaseClassifier(ABC):
    """Base class of the classifiers: reads pictures and ranks classes."""

    config: Config
    classes: tuple[str, ...]
    calibration: Calibration

    @abstractmethod
    def raw_outputs(self, raw_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the logits (B, Y) of pictures returned by ``read``, and their familiarity (B,)."""

    def raw_logits(self, raw_BHWC: np.ndarray) -> np.ndarray:
        """Return the logits (B, Y) of pictures returned by ``read``."""
        return self.raw_outputs(raw_BHWC)[0]

    def raw_probabilities(self, raw_BHWC: np.ndarray) -> np.ndarray:
        """Return the class probabilities (B, Y) of pictures returned by ``read``."""
        return self.calibration.probabilities(self.raw_logits(raw_BHWC))

    def predict(self, pictures: Pictures, top_k: int = 3) -> Rankings:
        """Return the ``top_k`` most probable classes of each picture, in descending order.

        Each ranking also says whether its picture is ``unlike`` the training images.

        Args:
            pictures: one or several; see ``vitrail.data.pictures`` for what is accepted.
            top_k: number of classes per picture.

        Raises:
            PictureError: a picture cannot be read.
            ConfigError: top_k is below 1.
        """
        return self.predict_raw(self.read(pictures), top_k)

    def predict_raw(self, raw_BHWC: np.ndarray, top_k: int = 3) -> Rankings:
        """Return what ``predict`` returns, for pictures returned by ``read``."""
        logits_BY, familiarity_B = self.raw_outputs(raw_BHWC)
        rankings = rank(self.calibration.probabilities(logits_BY), self.classes, top_k)
        if familiarity_B is not None:
            for ranking, familiarity in zip(rankings, familiarity_B, strict=True):
                ranking.familiarity = float(familiarity)
        return rankings

    def read(self, pictures: Pictures, *, background: Color = WHITE) -> np.ndarray:
        """Return pictures of any kind and size as uint8 at the model's size (B, H, W, C)."""
        model, data = self.config.model, self.config.data
        return stack_pictures(
            pictures,
            model.image_hw,
            model.n_channels,
            framing(data),
            pixel_range=data.pixel_range,
            background=background,
        )
