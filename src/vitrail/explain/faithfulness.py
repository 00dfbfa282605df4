"""Whether a map's values mean anything: their sum over hidden patches vs. the drop in score."""

import torch
from torch import Tensor

from vitrail.explain.removal import class_score, scores_shown
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import rng

SETS = 64
"""Number of random sets of hidden patches, the same for every image and method."""
HIDDEN = 1 / 4
"""Fraction of the patches in a set. All sets have the same size, so that size has no effect."""


def hidden_sets(patches: int, *, seed: int = 0) -> Tensor:
    """Return which patches each set hides: hidden_KN."""
    draws_KN = torch.rand(SETS, patches, generator=rng.generator(seed, "hidden"))
    return draws_KN.argsort(dim=1).argsort(dim=1) < max(1, round(patches * HIDDEN))


def logit_drops(
    model: VisionTransformer,
    images_BCHW: Tensor,
    classes_B: Tensor,
    hidden_KN: Tensor,
    *,
    chunk: int = 64,
) -> Tensor:
    """Return how much the class's logit drops when a set is painted in the mean color: drops_BK."""
    nothing_1N = torch.zeros_like(hidden_KN[:1])
    shown_RN = ~torch.cat([nothing_1N, hidden_KN]).to(images_BCHW.device)
    with torch.inference_mode():
        scores_BR = scores_shown(model, images_BCHW, shown_RN, class_score(classes_B), chunk).cpu()
    return scores_BR[:, :1] - scores_BR[:, 1:]


def faithfulness_correlation(maps_BGJ: Tensor, hidden_KN: Tensor, drops_BK: Tensor) -> Tensor:
    """Return Pearson's correlation, over the sets, of the summed map and the drop (B,).

    0 where either does not vary. A map of the true effect of each patch scores 1 if the effects
    are additive.

    Source: Bhatt et al. 2020, arXiv:2005.00631, equation 4.
    """
    sums_BK = maps_BGJ.flatten(1).double() @ hidden_KN.double().T
    pair = [x_BK - x_BK.mean(1, keepdim=True) for x_BK in (sums_BK, drops_BK.double())]
    first_B, second_B = (torch.linalg.vector_norm(x_BK, dim=1) for x_BK in pair)
    scale_B = first_B * second_B
    # For a uniform map, what is left is a rounding error.
    uniform_B = first_B <= 1e-6 * torch.linalg.vector_norm(sums_BK, dim=1)
    found_B = (pair[0] * pair[1]).sum(1) / scale_B.clamp(min=1e-30)
    return torch.where(uniform_B, 0.0, found_B)
