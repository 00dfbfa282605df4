"""Calibration on validation images: how confident to be, and which pictures are unlike them.

A model trained with label smoothing learns smoothed probabilities, so the smoothing is undone. Then
the logits are divided by a temperature, fitted to validation images, before the softmax; neither
their order nor the accuracy changes (Guo et al. 2017, arXiv:1706.04599). The features of validation
images (the input of the head) lie near a subspace: a picture counts as unlike the training images
if its features are farther from it than those of nearly all validation images ("Residual" in Wang
et al. 2022, arXiv:2203.10807). Torch is imported only for fitting and for torch models.
"""

import base64
import binascii
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vitrail.config.files import Checked
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FALSE_ALARMS = 0.05
"""Share of the validation images that counts as unlike the training images."""
FEWEST_IMAGES = 200
"""Half of the images set the threshold; with fewer than this, fewer than 5 would lie beyond it."""
SHARES = np.linspace(0, 1, 101)
LEAST = 1e-3
"""The fraction kept of a probability that is below what label smoothing adds to every class."""


@dataclass(frozen=True)
class Calibration(Checked):
    """Turns a model's logits into probabilities, and its features into a familiarity."""

    temperature: float = 1.0
    """What the logits are divided by; 1 if it was not fitted."""
    mean: str = ""
    """Mean (D,) of the features of validation images, float16 in base64; empty if too few."""
    directions: str = ""
    """Their principal directions (K, D), likewise."""
    distances: tuple[float, ...] = ()
    """Percentiles 0 to 100 of the distance of the other validation images from that subspace."""
    smoothing: float = 0.0
    """Label smoothing of the training, which is undone before the temperature applies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < np.inf:
            raise ConfigError(f"temperature is {self.temperature}: give a positive number")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"smoothing is {self.smoothing}: give a number from 0 to less than 1")
        numbers = (len(SHARES),) if self.mean else (0, len(SHARES))
        if len(self.distances) not in numbers or not np.isfinite(self.distances).all():
            raise ConfigError(f"distances must be {len(SHARES)} finite numbers, or none")
        if len(_unpack(self.directions)) % max(1, len(_unpack(self.mean))):
            raise ConfigError("directions are not as wide as the mean")

    def probabilities(self, logits_BY: np.ndarray) -> np.ndarray:
        """Return the probabilities (B, Y), or (Y,)."""
        if self.temperature != 1 or self.smoothing:  # not in exported files, which need no torch
            import torch

            logits_BY = self.scale(torch.from_numpy(logits_BY)).numpy()
        powers_BY = np.exp(logits_BY - logits_BY.max(axis=-1, keepdims=True))
        return powers_BY / powers_BY.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]

    def scale(self, logits_BY: "Tensor") -> "Tensor":
        """Return calibrated logits, whose softmax gives the probabilities.

        Label smoothing s adds s / Y to the target of every class, and thus to the probabilities
        that a model learns. This is subtracted; a smaller probability is multiplied by LEAST
        instead, so that the order of the classes stays the same.
        """
        if self.smoothing:
            log_BY = logits_BY.log_softmax(-1)
            added = self.smoothing / logits_BY.shape[-1]
            rest_BY = log_BY.exp() - added
            kept_BY = rest_BY > added * LEAST / (1 - LEAST)
            logits_BY = rest_BY.where(kept_BY, 1).log().where(kept_BY, log_BY + math.log(LEAST))
        return logits_BY / self.temperature

    @cached_property
    def subspace(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean (D,) and the directions (K, D)."""
        mean_D = _unpack(self.mean)
        return mean_D, _unpack(self.directions).reshape(-1, max(1, len(mean_D)))

    def familiarity(self, features_BD: np.ndarray) -> np.ndarray | None:
        """Return the share (B,) of validation images that are farther away; None if unknown."""
        return self.rank(distance(features_BD, *self.subspace)) if self.mean else None

    def rank(self, distance_B: np.ndarray) -> np.ndarray:
        """Return the share (B,) of validation images that are farther away than these distances."""
        familiarity_B: np.ndarray = np.interp(distance_B, self.distances, 1 - SHARES)
        return familiarity_B


def distance(features_BD: Any, mean_D: Any, directions_KD: Any) -> Any:
    """Return the distance (B,) of features from a subspace, for arrays or tensors."""
    centered_BD = features_BD - mean_D
    outside_BD = centered_BD - centered_BD @ directions_KD.T @ directions_KD
    return (outside_BD**2).sum(1) ** 0.5


def describe_unlike(familiarity: np.ndarray | float | None) -> str:
    """Return a note for a picture that is unlike the training images, else ""."""
    if familiarity is None or (familiarity := np.asarray(familiarity).item()) >= FALSE_ALARMS:
        return ""
    share = min(1 - familiarity, 0.999)
    return f"unlike the training images (more so than {share:.1%} of the validation images)"


def fit(
    logits_BY: "Tensor", labels_B: "Tensor", features_BD: "Tensor", *, smoothing: float = 0.0
) -> Calibration:
    """Fit temperature and subspace to the logits and features of validation images.

    The temperature minimizes the cross-entropy. Its targets are smoothed as in Platt 1999, as if
    two more images had been seen, one right and one wrong, so that a few images that are all right
    do not make the model certain. The subspace is fitted to half of the images, and the distances
    are those of the other half, which are as far from it as new images.

    Args:
        smoothing: the label smoothing of the training, which is undone first.
    """
    import torch
    from torch.nn import functional as F

    from vitrail.runtime import rng

    logits_BY = Calibration(smoothing=smoothing).scale(logits_BY.double())
    log_temperature = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        scaled_BY, unsure = logits_BY / log_temperature.exp(), 1 / (len(labels_B) + 2)
        value = F.cross_entropy(scaled_BY, labels_B, label_smoothing=unsure)
        value.backward()
        return value.item()

    optimizer.step(loss)
    temperature = log_temperature.clamp(-5, 5).exp().item()
    if len(labels_B) < FEWEST_IMAGES:
        return Calibration(temperature, smoothing=smoothing)
    order_B = torch.randperm(len(labels_B), generator=rng.generator(0, "calibration"))
    half_BD, others_BD = np.array_split(features_BD[order_B].numpy(), 2)
    *_, directions_DD = np.linalg.svd(half_BD - half_BD.mean(0), full_matrices=False)
    subspace = _pack(half_BD.mean(0)), _pack(directions_DD[: features_BD.shape[1] // 4])
    fitted = Calibration(temperature, *subspace, tuple(SHARES.tolist()), smoothing)
    far_B = distance(others_BD, *fitted.subspace)
    return replace(fitted, distances=tuple(np.quantile(far_B, SHARES).tolist()))


def _pack(values: np.ndarray) -> str:
    """Return numbers as base64 of float16."""
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def _unpack(text: str) -> np.ndarray:
    """Return the finite numbers of a text made by ``_pack``, flat, as float32."""
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float32)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"{text!r:.40} is not base64 of float16: {error}") from error
    if not np.isfinite(values).all():
        raise ConfigError(f"{text!r:.40} contains numbers that are not finite")
    return values


UNCALIBRATED = Calibration()
