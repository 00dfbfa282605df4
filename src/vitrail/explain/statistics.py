"""Means over images with 95 % confidence intervals."""

import math
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor

from vitrail.errors import DataError

FEWEST = 10
"""Fewer images give no useful interval."""


class Estimate(NamedTuple):
    """A mean over images, and the interval in which the true mean lies with 95 % confidence."""

    mean: float
    low: float
    high: float


def require_enough(images: int) -> None:
    """Refuse too few images for an interval.

    Raises:
        DataError: there are fewer than FEWEST.
    """
    if images < FEWEST:
        raise DataError(
            f"{images} images are too few for a confidence interval: give at least {FEWEST}"
        )


def estimate_mean(values_B: Tensor) -> Estimate:
    """Return the mean of one value an image, with Student's interval."""
    mean, half = values_B.double().mean().item(), half_width(values_B).item()
    return Estimate(mean, mean - half, mean + half)


def half_width(values_BX: Tensor, confidence: float = 0.95) -> Tensor:
    """Return half of Student's interval of the mean over the first dimension, any others kept.

    Source: Student 1908, "The probable error of a mean".
    """
    images = values_BX.shape[0]
    require_enough(images)
    deviation_X = values_BX.double().std(dim=0)
    return deviation_X * (t_quantile((1 + confidence) / 2, images - 1) / math.sqrt(images))


def surely_above_zero(differences_B: Tensor, error: float) -> bool:
    """Return whether the mean is above zero by a two-sided t test with this rate of error."""
    low = differences_B.double().mean() - half_width(differences_B, 1 - error)
    return bool(low > 0)


def t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's distribution, to three digits from nine degrees on.

    Source: Abramowitz and Stegun 1964, equation 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, start=1))
