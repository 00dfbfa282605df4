"""Which map to trust: maps scored image by image, together with control maps.

With object masks: whether the map's highest point is on the object (the pointing game), and how
much of the map is on it. Without: whether the class's probability falls when the patches that the
map ranks highest are deleted, and rises when they are inserted. The control maps (a random one, the
same blurred, and one that always points to the center) use neither the model nor the image: a
method that does not beat all of them is of no use on this model.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.config.settings import require
from vitrail.data.fills import FILLS
from vitrail.errors import DataError
from vitrail.evaluation.metrics import wilson_interval
from vitrail.explain.deletion_insertion import BATCH_SIZE, deletion_insertion
from vitrail.explain.faithfulness import faithfulness_correlation, hidden_sets, logit_drops
from vitrail.explain.map_settings import (
    METHODS,
    MapSettings,
    Method,
    require_importance,
    settings_of_all,
)
from vitrail.explain.methods import compute_maps
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import rng

CONTROLS = ("random", "blurred random", "center")
STEPS = 1 + len(FILLS)
"""Progress steps per method: its maps, then deletion and insertion with each fill."""
ERROR_RATE = 0.05
"""Probability that at least one mark in a table, for beating the controls, is wrong."""
FEWEST_IMAGES = 10
"""Fewer images give no useful interval."""


class Measure(NamedTuple):
    """One column of the table."""

    label: str
    higher_is_better: bool


MEASURES = {
    "pointing": Measure("pointing game", True),
    "mass": Measure("share inside", True),
    "srg": Measure("SRG", True),
    "correlation": Measure("faithfulness, correlation", True),
    "deletion_mean": Measure("deletion, mean", False),
    "deletion_blur": Measure("deletion, blur", False),
    "insertion_mean": Measure("insertion, mean", True),
    "insertion_blur": Measure("insertion, blur", True),
}
"""The first two need the objects' masks; deletion and insertion name their fill.

SRG, the symmetric relevance gain, is insertion minus deletion, averaged over the fills: removing
the lowest patches first shows the same images as inserting the highest, so it is the area between
the two orders of removal. A random map scores 0. Rankings by SRG depend least on the fill.

Source: Bluecher et al. 2024, arXiv:2401.06654.

The correlation is ``faithfulness.faithfulness_correlation``: deletion, insertion and SRG depend on
the order of a map's values only, the correlation on their size.
"""


# Maps against masks.


def pointing_game(maps_BGJ: Tensor, masks_BHW: Tensor) -> Tensor:
    """Return hits_B: 1 where the highest point of the map is on the object, 0 where it is not.

    Resized to the image bilinearly, a map is highest at the center of its highest patch. Where that
    center is between pixels, or several patches are equally high, the hit is the fraction of them
    on the object. (The highest *pixel* of a drawn map would favor the border, where no neighbor
    lowers the peaks.)

    Source: Zhang et al. 2018, "Top-down Neural Attention by Excitation Backprop", section 4.2,
    without its margin around the object.
    """
    _check_pairs(maps_BGJ, masks_BHW)
    grid_GJ = tuple(maps_BGJ.shape[1:])
    on_BGJ = F.interpolate(masks_BHW[:, None].double(), grid_GJ, mode="bilinear")[:, 0]
    highest_BGJ = (maps_BGJ == maps_BGJ.amax((1, 2), keepdim=True)).double()
    return (highest_BGJ * on_BGJ).sum((1, 2)) / highest_BGJ.sum((1, 2))


def mass_inside(maps_BGJ: Tensor, masks_BHW: Tensor) -> Tensor:
    """Return share_B: how much of the map, resized to the image bilinearly, is on the object.

    A constant offset carries no information: the map's lowest value is subtracted if it is above 0,
    as when drawing. Values below 0 count as 0, and a map without positive values counts as uniform.

    Source: Wang et al. 2020, "Score-CAM", arXiv:1910.01279, section 4.3 (energy-based pointing).
    """
    _check_pairs(maps_BGJ, masks_BHW)
    lowest_B11 = maps_BGJ.amin((1, 2), keepdim=True).clamp(min=0)
    rest_BGJ = (maps_BGJ - lowest_B11).clamp(min=0).double()
    flat_B11 = rest_BGJ.amax((1, 2), keepdim=True) == 0
    rest_BGJ = torch.where(flat_B11, torch.ones_like(rest_BGJ), rest_BGJ)
    size_HW = tuple(masks_BHW.shape[1:])
    placed_BHW = F.interpolate(rest_BGJ[:, None], size_HW, mode="bilinear")[:, 0]
    return (placed_BHW * masks_BHW).sum((1, 2)) / placed_BHW.sum((1, 2))


def _check_pairs(maps_BGJ: Tensor, masks_BHW: Tensor) -> None:
    if len(maps_BGJ) != len(masks_BHW):
        raise DataError(f"{len(maps_BGJ)} maps for {len(masks_BHW)} masks: give one for each")


# The control maps.


def center_maps(grid_GJ: tuple[int, int]) -> Tensor:
    """Return one map (1, G, J), a Gaussian in the center.

    Its standard deviation is a quarter of each side. Photographers center their subjects, so this
    map is often right without looking at the picture.
    """
    rows_G, columns_J = (
        torch.exp(-0.5 * ((torch.arange(n) + 0.5 - n / 2) / (n / 4)) ** 2) for n in grid_GJ
    )
    return torch.outer(rows_G, columns_J)[None]


# Means over images with 95% confidence intervals.


class Estimate(NamedTuple):
    """A mean over images and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def estimate_mean(values_B: Tensor) -> Estimate:
    """Return the mean of one value per image, with Student's interval."""
    mean, half = values_B.double().mean().item(), half_width(values_B).item()
    return Estimate(mean, mean - half, mean + half)


def half_width(values_BX: Tensor, confidence: float = 0.95) -> Tensor:
    """Return half the width of Student's interval of the mean over the first dimension: (X,).

    Source: Student 1908, "The probable error of a mean".

    Raises:
        DataError: there are fewer than FEWEST_IMAGES.
    """
    images = values_BX.shape[0]
    require_enough(images)
    deviation_X = values_BX.double().std(dim=0)
    return deviation_X * (t_quantile((1 + confidence) / 2, images - 1) / math.sqrt(images))


def require_enough(images: int) -> None:
    """Refuse too few images."""
    if images < FEWEST_IMAGES:
        raise DataError(
            f"{images} images are too few for a confidence interval: give at least {FEWEST_IMAGES}"
        )


def significantly_above_zero(differences_B: Tensor, error: float) -> bool:
    """Return whether the mean is above zero by a two-sided t test with this error rate."""
    low = differences_B.double().mean() - half_width(differences_B, 1 - error)
    return bool(low > 0)


def t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's distribution, to three digits from 9 degrees of freedom on.

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


# Methods and controls scored on the same images.


@dataclass(frozen=True)
class Score:
    """Scores of one method, or one control, on a set of images."""

    method: str
    n: int
    """Number of images."""
    estimates: Mapping[str, Estimate]
    """By the names in MEASURES; without masks the first two are missing."""
    beats: Mapping[str, bool]
    """By measure, whether it is significantly better than all controls; empty for a control."""
    shares: tuple[float, ...]
    """Horizontal axis of the curves: fraction of the patches deleted or inserted."""
    curves: Mapping[str, tuple[float, ...]]
    """Mean probability of the explained class at each share, by measure."""
    srg_B: tuple[float, ...]
    """The SRG of each image, for paired comparisons."""
    milliseconds: float = field(compare=False)
    """Time to compute the map of one image, in a batch."""

    @property
    def is_control(self) -> bool:
        """Whether this is a control, not a method."""
        return self.method in CONTROLS

    @property
    def beats_controls(self) -> bool:
        """Whether it is significantly better than all controls by every measure."""
        return bool(self.beats) and all(self.beats.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "method": self.method,
            "n": self.n,
            "milliseconds": self.milliseconds,
            "beats_controls": None if self.is_control else self.beats_controls,
            "measures": {
                name: {**estimate._asdict(), "beats_controls": self.beats.get(name)}
                for name, estimate in self.estimates.items()
            },
            "shares": list(self.shares),
            "curves": {name: list(curve) for name, curve in self.curves.items()},
        }


def paired_difference(one: Score, other: Score) -> Estimate:
    """Return the SRG of one method minus that of another, paired by image."""
    return estimate_mean(torch.tensor(one.srg_B) - torch.tensor(other.srg_B))


def paired_differences(scores: Sequence[Score]) -> dict[str, dict[str, Estimate]]:
    """Return by how much each method's SRG exceeds that of each lower-ranked method."""
    ranked = sorted(scores, key=lambda score: -score.estimates["srg"].mean)
    return {
        score.method: {lower.method: paired_difference(score, lower) for lower in ranked[rank:]}
        for rank, score in enumerate(ranked[:-1], start=1)
    }


class Outcome(NamedTuple):
    """The measures of one method, image by image, and its curves."""

    values: dict[str, Tensor]
    shares_S: Tensor
    curves: dict[str, Tensor]
    milliseconds: float = 0.0
    """Time to compute the map of one image."""


def score_methods(
    model: VisionTransformer,
    images_BCHW: Tensor,
    masks_BHW: Tensor | None,
    methods: Sequence[Method | MapSettings] = METHODS,
    *,
    steps: int = 16,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> list[Score]:
    """Score methods, and then the controls, on the same images.

    Every map explains the predicted class; if a method has several layers, the last one counts. A
    method beats the controls by a measure when it is better than each of them, image by image, in a
    paired t test. The error rate is divided by the number of marks in the table (Bonferroni), so
    that all of them together hold with 95% confidence.

    Args:
        model, images_BCHW: in evaluation mode; normalized, on the model's device.
        masks_BHW: the objects' pixels, or None where they are not known.
        methods: the methods, or settings of variants of them, to score, in order.
        steps: points of a curve after the first; at most one per patch.
        seed: for the random maps and the sets of hidden patches.
        advance: called ``STEPS`` times per method and control, to report progress.

    Raises:
        DataError: there are fewer than ten images, or not one mask for each of them.
        ConfigError: a method is a view, or does not work on the model.
    """
    require(steps >= 1, f"steps is {steps}: give at least 1")
    require_importance(methods)
    require_enough(len(images_BCHW))
    if masks_BHW is not None and len(masks_BHW) != len(images_BCHW):
        raise DataError(f"{len(masks_BHW)} masks for {len(images_BCHW)} images: give one for each")
    classes_B = predict_classes(model, images_BCHW)
    hidden_KN = hidden_sets(model.config.n_patches, seed=seed)
    drops_BK = logit_drops(model, images_BCHW, classes_B, hidden_KN)
    outcomes, start = {}, time.perf_counter()
    for name, maps_BGJ in _all_maps(model, images_BCHW, methods, classes_B, seed):
        seconds = time.perf_counter() - start
        values = _measure_on_objects(maps_BGJ, masks_BHW)
        values["correlation"] = faithfulness_correlation(maps_BGJ, hidden_KN, drops_BK)
        advance()
        outcome = _measure_order(
            model, images_BCHW, maps_BGJ, classes_B, values, steps=steps, advance=advance
        )
        outcomes[name] = outcome._replace(milliseconds=1000 * seconds / len(maps_BGJ))
        start = time.perf_counter()
    marks = len(methods) * len(next(iter(outcomes.values())).values)
    return [summarize(name, outcomes, ERROR_RATE / max(1, marks)) for name in outcomes]


def predict_classes(model: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Return the predicted class of each image (B,), on the CPU."""
    with torch.inference_mode():
        parts = images_BCHW.split(BATCH_SIZE)
        return torch.cat([model(part).argmax(1).cpu() for part in parts])


def _measure_on_objects(maps_BGJ: Tensor, masks_BHW: Tensor | None) -> dict[str, Tensor]:
    if masks_BHW is None:
        return {}
    masks_BHW = masks_BHW.cpu()
    return {
        "pointing": pointing_game(maps_BGJ, masks_BHW), "mass": mass_inside(maps_BGJ, masks_BHW)
    }  # fmt: skip


def _all_maps(
    model: VisionTransformer,
    images_BCHW: Tensor,
    methods: Sequence[Method | MapSettings],
    classes_B: Tensor,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """Yield each method's name and its maps (B, G, J), then the controls'."""
    for settings in settings_of_all(methods):
        maps = compute_maps(model, images_BCHW, settings, classes_B=classes_B)
        yield settings.variant, maps.values_BLGJ[:, -1]
    images, grid_GJ = len(images_BCHW), model.config.grid_GJ
    random_BGJ = torch.rand((images, *grid_GJ), generator=rng.generator(seed, "explain"))
    yield "random", random_BGJ
    # Insertion favors smooth maps, whatever they show.
    yield "blurred random", F.avg_pool2d(random_BGJ, 3, 1, padding=1, count_include_pad=False)
    yield "center", center_maps(grid_GJ).expand(images, -1, -1)


def _measure_order(
    model: VisionTransformer,
    images_BCHW: Tensor,
    maps_BGJ: Tensor,
    classes_B: Tensor,
    values: dict[str, Tensor],
    *,
    steps: int,
    advance: Callable[[], object],
) -> Outcome:
    """Add deletion, insertion and SRG of one method's maps to its other values."""
    curves: dict[str, Tensor] = {}
    for fill in FILLS:
        drawn = deletion_insertion(model, images_BCHW, maps_BGJ, classes_B, fill=fill, steps=steps)
        names = f"deletion_{fill}", f"insertion_{fill}"
        values |= zip(names, drawn.areas(), strict=True)
        curves |= zip(names, (drawn.deletion_BS, drawn.insertion_BS), strict=True)
        advance()
    gains = [values[f"insertion_{fill}"] - values[f"deletion_{fill}"] for fill in FILLS]
    values["srg"] = torch.stack(gains).mean(0)
    ordered = {name: values[name] for name in MEASURES if name in values}
    return Outcome(ordered, drawn.shares_S, {n: curve.mean(0) for n, curve in curves.items()})


def summarize(name: str, outcomes: Mapping[str, Outcome], error: float) -> Score:
    """Turn one method's values into estimates, and compare them with the controls'."""
    own = outcomes[name]

    def beats(measure: str, values_B: Tensor, control: str) -> bool:
        gain_B = values_B - outcomes[control].values[measure]
        sign = 1 if MEASURES[measure].higher_is_better else -1
        return significantly_above_zero(sign * gain_B, error)

    return Score(
        method=name,
        n=len(next(iter(own.values.values()))),
        estimates={measure: _estimate(measure, values) for measure, values in own.values.items()},
        beats={
            measure: all(beats(measure, values_B, control) for control in CONTROLS)
            for measure, values_B in own.values.items()
            if name not in CONTROLS
        },
        shares=tuple(own.shares_S.tolist()),
        curves={measure: tuple(curve_S.tolist()) for measure, curve_S in own.curves.items()},
        srg_B=tuple(own.values["srg"].tolist()),
        milliseconds=own.milliseconds,
    )


def _estimate(measure: str, values_B: Tensor) -> Estimate:
    """Return the mean with its interval: Wilson's for hits, Student's for everything else."""
    if measure != "pointing":
        return estimate_mean(values_B)
    # A tie counts as a fraction of a hit: the count is rounded for the interval only.
    return Estimate(
        values_B.mean().item(), *wilson_interval(round(values_B.sum().item()), len(values_B))
    )
