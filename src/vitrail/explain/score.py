"""Which map to trust: methods and floors scored on the same images.

The floors are a random map and one that always points to the middle: a method that is no better
than they are is of no use on this model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.config.settings import require_range
from vitrail.errors import DataError
from vitrail.evaluation.metrics import wilson_interval
from vitrail.explain.map_metrics import (
    BASELINES,
    Baseline,
    Curves,
    centre_maps,
    deletion_insertion,
    mass_inside,
    pointing_game,
    random_maps,
)
from vitrail.explain.methods import METHODS, MapSettings, Method, compute_maps
from vitrail.explain.statistics import Estimate, estimate_mean, require_enough, surely_above_zero
from vitrail.model import VisionTransformer
from vitrail.runtime import rng

__all__ = [
    "BASELINES",
    "FLOORS",
    "MEASURES",
    "STEPS",
    "Baseline",
    "Curves",
    "Estimate",
    "Measure",
    "Score",
    "ScoreSettings",
    "centre_maps",
    "deletion_insertion",
    "mass_inside",
    "pointing_game",
    "random_maps",
    "score_methods",
]

FLOORS = ("random", "centre")
STEPS = 1 + len(BASELINES)
"""Steps in which a method is scored: its maps, then deletion and insertion by each baseline."""
ERROR_RATE = 0.05
"""Probability that any mark of a table for beating the floors is wrong."""


class Measure(NamedTuple):
    """One column of the table."""

    label: str
    higher_is_better: bool


MEASURES = {
    "pointing": Measure("pointing game", True),
    "mass": Measure("share inside", True),
    "deletion_mean": Measure("deletion, mean", False),
    "deletion_blur": Measure("deletion, blur", False),
    "insertion_mean": Measure("insertion, mean", True),
    "insertion_blur": Measure("insertion, blur", True),
}
"""The first two need the objects' masks; deletion and insertion name their baseline."""


@dataclass(frozen=True)
class ScoreSettings:
    """How maps are scored."""

    steps: int = 16
    """Points of a deletion or insertion curve after the first; one a patch where that is fewer."""
    batch_size: int = 500
    """Images that the model sees at once."""
    seed: int = 0
    """The random maps are a function of it."""

    def __post_init__(self) -> None:
        require_range(self, "steps batch_size", 1)


@dataclass(frozen=True)
class Score:
    """How one method, or one floor, did on a set of images."""

    method: str
    n: int
    """Images."""
    estimates: Mapping[str, Estimate]
    """By the names in MEASURES; without masks the first two are missing."""
    beats: Mapping[str, bool]
    """By measure, whether it is significantly better than both floors; empty for a floor."""
    shares: tuple[float, ...]
    """Horizontal axis of the curves: share of the patches that went or came."""
    curves: Mapping[str, tuple[float, ...]]
    """Mean probability of the explained class at each share, by measure."""

    @property
    def is_floor(self) -> bool:
        """Whether this is a floor, not a method."""
        return self.method in FLOORS

    @property
    def beats_floors(self) -> bool:
        """Whether it is significantly better than both floors by every measure."""
        return bool(self.beats) and all(self.beats.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "method": self.method,
            "n": self.n,
            "beats_floors": None if self.is_floor else self.beats_floors,
            "measures": {
                name: {**estimate._asdict(), "beats_floors": self.beats.get(name)}
                for name, estimate in self.estimates.items()
            },
            "shares": list(self.shares),
            "curves": {name: list(curve) for name, curve in self.curves.items()},
        }


class Outcome(NamedTuple):
    """The measures of one method, image by image, and its curves."""

    values: dict[str, Tensor]
    shares_S: Tensor
    curves: dict[str, Tensor]


def score_methods(
    model: VisionTransformer,
    images_BCHW: Tensor,
    masks_BHW: Tensor | None,
    methods: Sequence[Method] = METHODS,
    *,
    settings: ScoreSettings | None = None,
    advance: Callable[[], object] = lambda: None,
) -> list[Score]:
    """Score methods, and then both floors, on the same images.

    Every map explains the class that the model predicts; of several layers, the last one counts.
    A method beats the floors by a measure when it is better than each of them, image by image, in
    a paired t test. The error rate is divided by the number of marks in the table (Bonferroni), so
    that they hold together with 95 % confidence.

    Args:
        model: in evaluation mode.
        images_BCHW: normalised, on the model's device.
        masks_BHW: the objects' pixels, or None where they are not known.
        methods: what to score, in the order wanted.
        settings: how to score.
        advance: called ``STEPS`` times per method and floor, as the work goes on.

    Raises:
        DataError: there are fewer than ten images, or not one mask for each.
        ConfigError: a method does not work on the model.
    """
    settings = settings or ScoreSettings()
    require_enough(len(images_BCHW))
    if masks_BHW is not None and len(masks_BHW) != len(images_BCHW):
        raise DataError(f"{len(masks_BHW)} masks for {len(images_BCHW)} images: give one for each")
    classes_B = predict_classes(model, images_BCHW, settings.batch_size)
    outcomes = {
        name: measure_maps(
            model, images_BCHW, masks_BHW, maps_BGJ, classes_B, settings=settings, advance=advance
        )
        for name, maps_BGJ in draw_maps(model, images_BCHW, methods, classes_B, settings.seed)
    }
    marks = len(methods) * len(next(iter(outcomes.values())).values)
    return [summarise(name, outcomes, ERROR_RATE / max(1, marks)) for name in outcomes]


def predict_classes(model: VisionTransformer, images_BCHW: Tensor, batch_size: int) -> Tensor:
    """Return the predicted classes (B), on the CPU."""
    with torch.inference_mode():
        return torch.cat([model(part).argmax(1).cpu() for part in images_BCHW.split(batch_size)])


def draw_maps(
    model: VisionTransformer,
    images_BCHW: Tensor,
    methods: Sequence[Method],
    classes_B: Tensor,
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """Yield each method's name and its maps (B, G, J), then the floors'."""
    for method in methods:
        maps = compute_maps(model, images_BCHW, MapSettings(method=method), classes_B=classes_B)
        yield method, maps.values_BLGJ[:, -1]
    images, grid_GJ = len(images_BCHW), model.config.grid_GJ
    yield "random", random_maps((images, *grid_GJ), rng.generator(seed, "explain"))
    yield "centre", centre_maps(grid_GJ).expand(images, -1, -1)


def measure_maps(
    model: VisionTransformer,
    images_BCHW: Tensor,
    masks_BHW: Tensor | None,
    maps_BGJ: Tensor,
    classes_B: Tensor,
    *,
    settings: ScoreSettings,
    advance: Callable[[], object],
) -> Outcome:
    """Take every measure of one method's maps."""
    advance()  # computing the maps was the first step
    values: dict[str, Tensor] = {}
    if masks_BHW is not None:
        masks_BHW = masks_BHW.cpu()
        values["pointing"] = pointing_game(maps_BGJ, masks_BHW)
        values["mass"] = mass_inside(maps_BGJ, masks_BHW)
    curves: dict[str, Tensor] = {}
    for baseline in BASELINES:
        drawn = deletion_insertion(
            model, images_BCHW, maps_BGJ, classes_B, baseline=baseline, steps=settings.steps,
            batch_size=settings.batch_size,
        )  # fmt: skip
        names = f"deletion_{baseline}", f"insertion_{baseline}"
        values |= zip(names, drawn.areas(), strict=True)
        curves |= zip(names, (drawn.deletion_BS, drawn.insertion_BS), strict=True)
        advance()
    ordered = {name: values[name] for name in MEASURES if name in values}
    return Outcome(ordered, drawn.shares_S, {n: curve.mean(0) for n, curve in curves.items()})


def summarise(name: str, outcomes: Mapping[str, Outcome], error: float) -> Score:
    """Turn one method's values into estimates, and compare them with the floors'."""
    own = outcomes[name]
    beats = {
        measure: all(
            surely_better(measure, values_B, outcomes[floor].values[measure], error)
            for floor in FLOORS
        )
        for measure, values_B in own.values.items()
        if name not in FLOORS
    }
    return Score(
        method=name,
        n=len(next(iter(own.values.values()))),
        estimates={measure: estimate(measure, values) for measure, values in own.values.items()},
        beats=beats,
        shares=tuple(own.shares_S.tolist()),
        curves={measure: tuple(curve_S.tolist()) for measure, curve_S in own.curves.items()},
    )


def surely_better(measure: str, values_B: Tensor, floor_B: Tensor, error: float) -> bool:
    """Return whether the values are significantly better than a floor's, image by image."""
    gain_B = values_B - floor_B if MEASURES[measure].higher_is_better else floor_B - values_B
    return surely_above_zero(gain_B, error)


def estimate(measure: str, values_B: Tensor) -> Estimate:
    """Return the mean with its interval: Wilson's of hits, Student's of everything else."""
    if measure != "pointing":
        return estimate_mean(values_B)
    # A tie counts a part of a hit: the count is rounded for the interval only.
    return Estimate(
        values_B.mean().item(), *wilson_interval(round(values_B.sum().item()), len(values_B))
    )
