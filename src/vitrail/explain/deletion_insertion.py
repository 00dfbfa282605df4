"""Deletion and insertion: the class's probability while patches are removed in a map's order."""

from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.data.fills import Fill, fill_images, spread
from vitrail.errors import CheckpointError
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import rng

BATCH_SIZE = 500
"""Images per forward pass."""


class Curves(NamedTuple):
    """Probability of the explained class while patches are deleted or inserted.

    Shapes:
        shares_S: fraction of the patches deleted or inserted, 0 to 1; deletion_BS, insertion_BS.
    """

    shares_S: Tensor
    deletion_BS: Tensor
    insertion_BS: Tensor

    def areas(self) -> tuple[Tensor, Tensor]:
        """Return the area under each curve, by the trapezoidal rule: deletion_B, insertion_B."""
        return (
            torch.trapezoid(self.deletion_BS, self.shares_S),
            torch.trapezoid(self.insertion_BS, self.shares_S),
        )


def deletion_insertion(
    model: VisionTransformer,
    images_BCHW: Tensor,
    maps_BGJ: Tensor,
    classes_B: Tensor,
    *,
    fill: Fill,
    steps: int = 16,
    batch_size: int = BATCH_SIZE,
) -> Curves:
    """Record the class's probability while patches are replaced by the fill, or the reverse.

    The patches that the map ranks highest are deleted or inserted first. If these are what the
    model needs, the area under the first curve is low and that under the second is high. Ties are
    broken by one fixed random order, so that a uniform map scores like a random one.

    Args:
        model: in evaluation mode.
        images_BCHW: normalized, on the model's device.
        maps_BGJ: one map per image.
        classes_B: the class whose probability is recorded.
        fill: the image's mean color, or the blurred image.
        steps: points of a curve after the first; at most one per patch.
        batch_size: images per forward pass.

    Source: Petsiuk et al. 2018, "RISE", arXiv:1806.07421, section 4.2.
    """
    ranks_BN = rank_patches(maps_BGJ).to(images_BCHW.device)
    patches = ranks_BN.shape[1]
    counts_S = count_patches(patches, steps)
    chunk = max(1, batch_size // len(counts_S))
    deletion, insertion = [], []
    for images, ranks, classes in zip(
        images_BCHW.split(chunk), ranks_BN.split(chunk), classes_B.split(chunk), strict=True
    ):
        early_BSN = ranks[:, None] < counts_S[:, None].to(ranks.device)
        nothing = fill_images(images, fill)
        inserted_BS = probabilities(model, images, nothing, early_BSN, classes)
        between_BS = probabilities(model, nothing, images, early_BSN[:, 1:-1], classes)
        # The curves share their end points: the whole image, and none of it.
        ends = inserted_BS[:, -1:], between_BS, inserted_BS[:, :1]
        deletion.append(torch.cat(ends, dim=1))
        insertion.append(inserted_BS)
    return Curves(counts_S.double() / patches, torch.cat(deletion), torch.cat(insertion))


def count_patches(patches: int, steps: int) -> Tensor:
    """Return how many patches are removed at each point of a curve, from none to all."""
    return torch.linspace(0, patches, min(steps, patches) + 1).round().long()


def probabilities(
    model: VisionTransformer, ins_BCHW: Tensor, outs_BCHW: Tensor, in_BSN: Tensor, classes_B: Tensor
) -> Tensor:
    """Return the class's probability (B, S) on images that combine two others, patch by patch."""
    B, S, _ = in_BSN.shape
    if S == 0:
        return torch.empty(B, 0, dtype=torch.float64)
    in_BS1HW = spread(in_BSN, model.config.grid_GJ, model.config.patch_size)
    mixed_BSCHW = torch.where(in_BS1HW, ins_BCHW[:, None], outs_BCHW[:, None])
    with torch.inference_mode():
        logits_BSY = model(mixed_BSCHW.flatten(0, 1)).view(B, S, -1).cpu()
    picked_BS1 = classes_B.cpu().view(B, 1, 1).expand(B, S, 1)
    probability_BS1: Tensor = logits_BSY.double().softmax(2).gather(2, picked_BS1)
    return probability_BS1[:, :, 0]


def rank_patches(maps_BGJ: Tensor) -> Tensor:
    """Return ranks_BN: 0 for each map's highest patch; ties are ordered by one fixed shuffle."""
    values_BN = maps_BGJ.flatten(1).cpu()
    if not values_BN.isfinite().all():
        raise CheckpointError(
            "a map is not finite (nan, inf): the model's weights are corrupt; use an earlier "
            "checkpoint"
        )
    shuffled_N = torch.randperm(values_BN.shape[1], generator=rng.generator(0, "ties"))
    order_BN = values_BN[:, shuffled_N].argsort(dim=1, descending=True, stable=True)
    best_first_BN: Tensor = shuffled_N[order_BN]
    return best_first_BN.argsort(dim=1)
