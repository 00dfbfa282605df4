"""How far a map can be trusted, measured image by image.

With the object's mask: does the map's highest point lie on the object (the pointing game), and how
much of the map lies on it. Without: does the class's probability fall when the patches that the map
names are deleted, and rise when they are inserted. And two floors, maps that
use neither the model nor the image.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.errors import CheckpointError, DataError
from vitrail.model import VisionTransformer
from vitrail.runtime import rng

Baseline = Literal["mean", "blur"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""What replaces a removed patch: the image's mean color, or the blurred image."""
BLUR_SHARE = 1 / 8
"""Standard deviation of the blur as a share of the image's shorter side."""


class Curves(NamedTuple):
    """Probability of the explained class while patches go (deletion) or come (insertion).

    Shapes:
        shares_S: share of the patches that went or came, from 0 to 1; deletion_BS, insertion_BS.
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


def pointing_game(maps_BGJ: Tensor, masks_BHW: Tensor) -> Tensor:
    """Return hits_B: 1 where the highest point of the map is on the object, 0 where it is not.

    Laid over the image bilinearly, a map is highest in the middle of its highest patch. Where that
    middle lies between pixels, or several patches are as high, the hit is the share of them that
    are the object's. (The highest *pixel* of a drawn map would favour the border, where nothing
    rounds the peaks off.)

    Source: Zhang et al. 2018, "Top-down Neural Attention by Excitation Backprop", section 4.2,
    without its margin about the object.
    """
    check_pairs(maps_BGJ, masks_BHW)
    grid_GJ = tuple(maps_BGJ.shape[1:])
    on_BGJ = F.interpolate(masks_BHW[:, None].double(), grid_GJ, mode="bilinear")[:, 0]
    highest_BGJ = (maps_BGJ == maps_BGJ.amax((1, 2), keepdim=True)).double()
    return (highest_BGJ * on_BGJ).sum((1, 2)) / highest_BGJ.sum((1, 2))


def mass_inside(maps_BGJ: Tensor, masks_BHW: Tensor) -> Tensor:
    """Return share_B: how much of the map, laid over the image bilinearly, is on the object.

    What all patches share carries no information: the map's lowest value is subtracted where it is
    above 0, as in drawing. Values below 0 count as 0, and a map without positive values counts as
    flat.

    Source: Wang et al. 2020, "Score-CAM", arXiv:1910.01279, section 4.3 (energy-based pointing).
    """
    check_pairs(maps_BGJ, masks_BHW)
    lowest_B11 = maps_BGJ.amin((1, 2), keepdim=True).clamp(min=0)
    rest_BGJ = (maps_BGJ - lowest_B11).clamp(min=0).double()
    flat_B11 = rest_BGJ.amax((1, 2), keepdim=True) == 0
    rest_BGJ = torch.where(flat_B11, torch.ones_like(rest_BGJ), rest_BGJ)
    size_HW = tuple(masks_BHW.shape[1:])
    placed_BHW = F.interpolate(rest_BGJ[:, None], size_HW, mode="bilinear")[:, 0]
    return (placed_BHW * masks_BHW).sum((1, 2)) / placed_BHW.sum((1, 2))


def check_pairs(maps_BGJ: Tensor, masks_BHW: Tensor) -> None:
    """Refuse different numbers of maps and masks."""
    if len(maps_BGJ) != len(masks_BHW):
        raise DataError(f"{len(maps_BGJ)} maps for {len(masks_BHW)} masks: give one for each")


def deletion_insertion(
    model: VisionTransformer,
    images_BCHW: Tensor,
    maps_BGJ: Tensor,
    classes_B: Tensor,
    *,
    baseline: Baseline,
    steps: int = 16,
    batch_size: int = 500,
) -> Curves:
    """Watch the class's probability while patches give way to the baseline, or the reverse.

    The patches that the map names most important go (deletion) or come (insertion) first. A map
    that names what the model needs has a low area under the first curve and a high one under the
    second. Patches that are as high as each other follow in one shuffled order, so that a flat map
    does as a random one would.

    Args:
        model: in evaluation mode.
        images_BCHW: normalised, on the model's device.
        maps_BGJ: one map an image.
        classes_B: the class whose probability is watched.
        baseline: the image's mean colour, or the image blurred.
        steps: points of a curve after the first; one a patch where there are fewer patches.
        batch_size: images that the model sees at once.

    Source: Petsiuk et al. 2018, "RISE", arXiv:1806.07421, section 4.2.
    """
    ranks_BN = rank_patches(maps_BGJ).to(images_BCHW.device)
    patches = ranks_BN.shape[1]
    counts_S = torch.linspace(0, patches, min(steps, patches) + 1).round().long()
    chunk = max(1, batch_size // len(counts_S))
    deletion, insertion = [], []
    for images, ranks, classes in zip(
        images_BCHW.split(chunk), ranks_BN.split(chunk), classes_B.split(chunk), strict=True
    ):
        early_BSN = ranks[:, None] < counts_S[:, None].to(ranks.device)
        nothing = draw_baseline(images, baseline)
        deletion.append(watch(model, nothing, images, early_BSN, classes))
        insertion.append(watch(model, images, nothing, early_BSN, classes))
    return Curves(counts_S.double() / patches, torch.cat(deletion), torch.cat(insertion))


def watch(
    model: VisionTransformer, ins_BCHW: Tensor, outs_BCHW: Tensor, in_BSN: Tensor, classes_B: Tensor
) -> Tensor:
    """Return the class's probability (B, S) on images put together from two, patch by patch."""
    B, S, _ = in_BSN.shape
    side = model.config.patch_size
    in_BSGJ = in_BSN.view(B, S, *model.config.grid_GJ)
    in_BS1HW = in_BSGJ.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, None]
    mixed_BSCHW = torch.where(in_BS1HW, ins_BCHW[:, None], outs_BCHW[:, None])
    with torch.inference_mode():
        logits_BSY = model(mixed_BSCHW.flatten(0, 1)).view(B, S, -1).cpu()
    picked_BS1 = classes_B.cpu().view(B, 1, 1).expand(B, S, 1)
    probability_BS1: Tensor = logits_BSY.double().softmax(2).gather(2, picked_BS1)
    return probability_BS1[:, :, 0]


def rank_patches(maps_BGJ: Tensor) -> Tensor:
    """Return ranks_BN: 0 for each map's highest patch; equal patches by one shuffled order."""
    values_BN = maps_BGJ.flatten(1).cpu()
    if not values_BN.isfinite().all():
        raise CheckpointError(
            "a map is not finite (nan, inf): the model's weights are damaged, take an earlier "
            "checkpoint"
        )
    shuffled_N = torch.randperm(values_BN.shape[1], generator=rng.generator(0, "ties"))
    order_BN = values_BN[:, shuffled_N].argsort(dim=1, descending=True, stable=True)
    best_first_BN: Tensor = shuffled_N[order_BN]
    return best_first_BN.argsort(dim=1)


def draw_baseline(images_BCHW: Tensor, baseline: Baseline) -> Tensor:
    """Return what replaces removed patches: each image's mean color, or the blurred image."""
    if baseline == "mean":
        return images_BCHW.mean((2, 3), keepdim=True).expand_as(images_BCHW)
    return blur(images_BCHW, BLUR_SHARE * min(images_BCHW.shape[2:]))


def blur(images_BCHW: Tensor, deviation: float) -> Tensor:
    """Return images blurred by a Gaussian cut off at three deviations; the border repeats."""
    radius = max(1, round(3 * deviation))
    offsets_X = torch.arange(-radius, radius + 1, device=images_BCHW.device)
    weights_X = (-0.5 * (offsets_X / deviation) ** 2).exp()
    C = images_BCHW.shape[1]
    kernel_C11X = (weights_X / weights_X.sum()).expand(C, 1, 1, -1)
    padded = F.pad(images_BCHW, (radius,) * 4, mode="replicate")
    along = F.conv2d(padded, kernel_C11X, groups=C)
    return F.conv2d(along, kernel_C11X.transpose(2, 3), groups=C)


def random_maps(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return maps (B, G, J) of independent numbers from 0 to 1: the first floor."""
    return torch.rand(shape, generator=generator)


def centre_maps(grid_GJ: tuple[int, int]) -> Tensor:
    """Return one map (1, G, J), a bell over the middle: the second floor.

    Its deviation is a quarter of each side. Photographers put things in the middle, so this map is
    often right without having seen the picture.
    """
    rows_G, columns_J = (
        torch.exp(-0.5 * ((torch.arange(n) + 0.5 - n / 2) / (n / 4)) ** 2) for n in grid_GJ
    )
    return torch.outer(rows_G, columns_J)[None]
