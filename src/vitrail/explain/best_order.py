"""How good a map could be: the best order of removal that a greedy search finds for each image."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.data.fills import FILLS, fill_images
from vitrail.explain.deletion_insertion import (
    BATCH_SIZE,
    count_patches,
    deletion_insertion,
    probabilities,
)
from vitrail.explain.map_metrics import Estimate, Score, estimate_mean, predict_classes
from vitrail.model.vit import VisionTransformer

CEILING_IMAGES = 16
"""Number of images to search; the search takes many passes: 2,176 per image of 64 patches."""


class Ceiling(NamedTuple):
    """The SRG of the best orders found for the first images, and how close methods come to it."""

    n: int
    """Number of images."""
    srg: Estimate
    shares: dict[str, float]
    """Mean SRG of each method and control on the same images, as a fraction of the ceiling's."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**self._asdict(), "srg": self.srg._asdict()}


def find_ceiling(
    model: VisionTransformer, images_BCHW: Tensor, scores: Sequence[Score], *, steps: int = 16
) -> Ceiling:
    """Search for the best order on the first of the images that were scored."""
    images_BCHW = images_BCHW[:CEILING_IMAGES]
    classes_B = predict_classes(model, images_BCHW)
    maps_BGJ = best_orders(model, images_BCHW, classes_B, steps=steps)
    gains = []
    for fill in FILLS:
        curves = deletion_insertion(model, images_BCHW, maps_BGJ, classes_B, fill=fill, steps=steps)
        deletion_B, insertion_B = curves.areas()
        gains.append(insertion_B - deletion_B)
    best = estimate_mean(torch.stack(gains).mean(0))
    n = len(images_BCHW)
    means = {score.method: sum(score.srg_B[:n]) / n for score in scores}
    return Ceiling(n, best, {name: mean / best.mean for name, mean in means.items()})


def best_orders(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, *, steps: int = 16
) -> Tensor:
    """Return maps_BGJ, highest for the patches that a greedy search for the best SRG takes first.

    At each point of the curves, every remaining patch is tried: together with those taken before,
    it is shown alone and then hidden alone, with both fills. The patches that raise insertion minus
    deletion most are taken. All curves share one order, as they do for a map, so that the two SRGs
    can be compared. The search does not look ahead: a better order may exist.

    Source: after Edin et al. 2024, arXiv:2408.08137, section 3 (with a beam of one).
    """
    chunk = max(1, BATCH_SIZE // model.config.grid_GJ[0] // model.config.grid_GJ[1])
    maps = [
        _search(model, images, classes, steps)
        for images, classes in zip(images_BCHW.split(chunk), classes_B.split(chunk), strict=True)
    ]
    return torch.cat(maps).view(-1, *model.config.grid_GJ)


def _search(model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, steps: int) -> Tensor:
    """Return the values of the patches (B, N): the earlier a patch is taken, the higher."""
    B, N = len(images_BCHW), model.config.n_patches
    fills = [fill_images(images_BCHW, fill) for fill in FILLS]
    values_BN = torch.full((B, N), -float(N))
    for before, after in pairwise(count_patches(N, steps).tolist()):
        taken_BN = values_BN > -N
        left_BR = (~taken_BN).nonzero()[:, 1].view(B, N - before)
        tried_BRN = taken_BN[:, None] | (left_BR[:, :, None] == torch.arange(N))
        tried_BRN = tried_BRN.to(images_BCHW.device)
        gains_BR = sum(
            probabilities(model, images_BCHW, blank, tried_BRN, classes_B)
            - probabilities(model, blank, images_BCHW, tried_BRN, classes_B)
            for blank in fills
        )
        assert isinstance(gains_BR, Tensor)
        best_BK = left_BR.gather(1, gains_BR.topk(after - before).indices)
        values_BN.scatter_(1, best_BK, -torch.arange(before, after).float().expand(B, -1))
    return values_BN
