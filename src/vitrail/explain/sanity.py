"""Checks that a map must pass to be believed: it depends on the weights, and on the class."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.images import ImageSet
from vitrail.data.shortcut import add_marks, mark_mask
from vitrail.errors import ConfigError
from vitrail.explain import removal
from vitrail.explain.map_metrics import FEWEST_IMAGES, Estimate, estimate_mean, predict_classes
from vitrail.explain.map_settings import (
    REMOVAL,
    MapSettings,
    Method,
    require_importance,
    settings_of_all,
)
from vitrail.explain.methods import compute_maps, fitting
from vitrail.model.finetune import build_model, resize
from vitrail.model.layers import LayerScale
from vitrail.model.vit import VisionTransformer, initialize
from vitrail.runtime import rng

CHECKED = 40
"""Number of images for the test with random weights, which takes many passes per image."""
TILES = 4
"""Images in a mosaic."""
REMOVAL_READS = 25
"""Maximum number of mosaics for methods that hide patches."""
LEAST_SHARE = 1 / TILES + 0.01
"""Above this share in its class's tile, a map depends on the class: uniform plus one point."""
TOO_SIMILAR = 0.5
"""A map that is this similar after all weights were randomized does not depend on the model."""


class Sanity(NamedTuple):
    """The checks of one method: whether it depends on the weights, and on the class."""

    method: str
    similarity: Mapping[str, Estimate]
    """Rank correlation with the trained model's map, after each part was randomized."""
    in_tile: Estimate | None
    """Share of the map of a class in its tile of a mosaic; None without ten mosaics."""

    @property
    def depends_on_model(self) -> bool:
        """Whether the map changes when all weights are random."""
        return list(self.similarity.values())[-1].high < TOO_SIMILAR

    @property
    def depends_on_class(self) -> bool | None:
        """Whether significantly more than a uniform map's 25% is in the tile: at least 26%."""
        return self.in_tile and self.in_tile.low > LEAST_SHARE

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "method": self.method,
            "depends_on_model": self.depends_on_model,
            "depends_on_class": self.depends_on_class,
            "similarity": {name: e._asdict() for name, e in self.similarity.items()},
            "in_tile": self.in_tile and self.in_tile._asdict(),
        }


def check_methods(
    model: VisionTransformer,
    images_BCHW: Tensor,
    labels_B: Tensor,
    methods: Sequence[Method | MapSettings],
    *,
    advance: Callable[[], object] = lambda: None,
) -> list[Sanity]:
    """Check methods on the first images, at most CHECKED, and on mosaics of all of them.

    Methods that hide patches take hundreds of passes per mosaic: they get at most REMOVAL_READS.

    ``advance`` is called once per method, to report progress.

    Raises:
        ConfigError: a method is a view.
        DataError: there are fewer than ten images.
    """
    require_importance(methods)
    few_BCHW = images_BCHW[:CHECKED]
    mosaics = make_mosaics(images_BCHW, labels_B)
    reader = enlarge(model) if len(mosaics[0]) >= FEWEST_IMAGES else None
    found = []
    for method in settings_of_all(methods):
        (settings,) = settings_of_all([method], passes=128)
        in_tile = None
        similarity = randomization(model, few_BCHW, settings)
        if reader is not None:
            some = slice(REMOVAL_READS if settings.method in REMOVAL else None)
            shares_M4 = shares_in_tiles(reader, mosaics[0][some], mosaics[1][some], settings)
            in_tile = estimate_mean(shares_M4.mean(1))
        found.append(Sanity(method.variant, similarity, in_tile))
        advance()
    return found


# Does it depend on the weights?


def randomization(
    model: VisionTransformer, images_BCHW: Tensor, settings: MapSettings, *, seed: int = 0
) -> Mapping[str, Estimate]:
    """Return how similar the maps stay while the weights are randomized, from head to stem.

    The weights are initialized anew, part by part and cumulatively. Similarity is Spearman's rank
    correlation of a map with the trained model's, averaged over images; a map that stays similar
    when all weights are random shows the picture, not the model. All maps explain the class that
    the trained model predicts.

    Source: Adebayo et al. 2018, arXiv:1810.03292, section 3.1 (cascading randomization).
    """
    original = compute_maps(model, images_BCHW, settings)
    before_BN = original.values_BLGJ[:, -1].flatten(1)
    model = copy.deepcopy(model)
    blocks = [(f"block {n}", block) for n, block in enumerate(model.blocks, start=1)]
    # The last part is the whole model: positions and class token are not part of a submodule.
    parts = [("head", nn.ModuleList([model.norm, model.head])), *blocks[::-1], ("stem", model)]
    found = {"trained": Estimate(1.0, 1.0, 1.0)}
    with rng.seeded(seed, "sanity", device=images_BCHW.device):
        for name, part in parts:
            part.apply(partial(_reset, std=model.config.init_std))
            maps = compute_maps(model, images_BCHW, settings, classes_B=original.classes_B)
            found[name] = estimate_mean(
                rank_correlation(before_BN, maps.values_BLGJ[:, -1].flatten(1))
            )
    return found


def _reset(module: nn.Module, std: float) -> None:
    """Initialize a module's own weights anew, as before training."""
    if isinstance(module, nn.LayerNorm | nn.BatchNorm2d | LayerScale):
        module.reset_parameters()
    else:
        initialize(module, std=std)


def rank_correlation(one_BN: Tensor, other_BN: Tensor) -> Tensor:
    """Return Spearman's correlation of each row (B,); 0 for a uniform one.

    Tied values get the mean of their ranks.
    """
    one_BN, other_BN = (_ranks(values_BN) for values_BN in (one_BN, other_BN))
    covariance_B = (one_BN * other_BN).mean(1)
    scale_B = (one_BN.square().mean(1) * other_BN.square().mean(1)).sqrt()
    return covariance_B / scale_B.clamp(min=1e-12)


def _ranks(values_BN: Tensor) -> Tensor:
    """Return the rank of each value in its row, minus the mean rank."""
    values_BN = values_BN.contiguous()
    sorted_BN = values_BN.sort().values
    smaller_BN = torch.searchsorted(sorted_BN, values_BN)
    not_larger_BN = torch.searchsorted(sorted_BN, values_BN, right=True)
    return (smaller_BN + not_larger_BN - values_BN.shape[1]).double() / 2


# Does it depend on the class?


def make_mosaics(images_BCHW: Tensor, labels_B: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return mosaics of four images of different classes, and the classes.

    No image is in two mosaics, so that the mosaics are independent samples. There are as many as
    the classes permit.

    Shapes:
        images_BCHW, labels_B -> mosaics_MCHW, twice as high and wide; classes_M4: top left, top
        right, bottom left, bottom right.

    Source: Böhle et al. 2021, arXiv:2104.00032 (the grid pointing game).
    """
    generator = rng.generator(seed, "sanity")
    shuffled_B = torch.randperm(len(labels_B), generator=generator)
    left = [shuffled_B[labels_B[shuffled_B] == label].tolist() for label in labels_B.unique()]
    chosen: list[int] = []
    while True:
        # From the classes with the most images left: this gives the most mosaics.
        order = torch.randperm(len(left), generator=generator).tolist()
        largest = sorted(order, key=lambda label: -len(left[label]))[:TILES]
        if len(largest) < TILES or not left[largest[-1]]:
            break
        tiles = torch.randperm(TILES, generator=generator).tolist()
        chosen += [left[largest[tile]].pop() for tile in tiles]
    index_M4 = torch.tensor(chosen, dtype=torch.long).view(-1, TILES)
    tiles_M4CHW = images_BCHW[index_M4.to(images_BCHW.device)]
    rows = [torch.cat([tiles_M4CHW[:, i], tiles_M4CHW[:, i + 1]], dim=3) for i in (0, 2)]
    return torch.cat(rows, dim=2), labels_B[index_M4]


def enlarge(model: VisionTransformer) -> VisionTransformer | None:
    """Return the model for images that are twice as high and wide, with resized positions.

    None if such images are larger than a model allows.
    """
    height, width = model.config.image_hw
    try:
        config = dataclasses.replace(model.config, image_size=(2 * height, 2 * width))
    except ConfigError:
        return None
    weights, _ = resize(model.state_dict(), model.config, config)
    return build_model(config, weights).to(next(model.parameters()).device).eval()


def shares_in_tiles(
    model: VisionTransformer, mosaics_MCHW: Tensor, classes_M4: Tensor, settings: MapSettings
) -> Tensor:
    """Return how much of the map of each tile's class lies in that tile: shares_M4.

    A method that ignores the class gets a quarter on average, and so does a map without positive
    values.
    """
    H, W = mosaics_MCHW.shape[2:]
    maps_M4GJ = _maps_of_classes(model, mosaics_MCHW, classes_M4, settings)
    shares = []
    for tile in range(TILES):
        row, column = divmod(tile, 2)
        inside_HW = torch.zeros(H, W)
        inside_HW[row * H // 2 : (row + 1) * H // 2, column * W // 2 : (column + 1) * W // 2] = 1
        shares.append(_share_inside(maps_M4GJ[:, tile], inside_HW))
    return torch.stack(shares, dim=1)


def _maps_of_classes(
    model: VisionTransformer, images_BCHW: Tensor, classes_BK: Tensor, settings: MapSettings
) -> Tensor:
    """Return the maps (B, K, G, J) of several classes; methods that hide patches share passes."""
    if settings.method not in REMOVAL:
        maps = [compute_maps(model, images_BCHW, settings, classes_B=c) for c in classes_BK.T]
        return torch.stack([each.values_BLGJ[:, -1] for each in maps], dim=1)
    classes_BK = classes_BK.to(images_BCHW.device)
    settings = dataclasses.replace(settings, chunk=min(settings.chunk, fitting(model)))

    def score(logits_XY: Tensor, image_X: Tensor) -> Tensor:
        return logits_XY.gather(1, classes_BK[image_X])

    with torch.no_grad():
        return removal.compute(model, images_BCHW, score, settings)[0].cpu()


def _share_inside(maps_BGJ: Tensor, inside_HW: Tensor) -> Tensor:
    """Return how much of each map is inside (B,); values below 0 count as 0.

    A map without positive values counts as uniform.
    """
    positive_BHW = F.interpolate(maps_BGJ[:, None].double().clamp(min=0), inside_HW.shape)[:, 0]
    mass_B = positive_BHW.sum((1, 2))
    own_B = (positive_BHW * inside_HW).sum((1, 2))
    return torch.where(mass_B > 0, own_B / mass_B.clamp(min=1e-30), inside_HW.double().mean())


# Does it find what the model uses?


class Shortcut(NamedTuple):
    """How a model uses the mark planted in its training images, and which maps show it."""

    accuracies: Mapping[str, float]
    """With each image's own mark, without a mark, and with another class's."""
    decided: int
    """Number of images that are predicted as the class of the wrong mark on them."""
    shares: Mapping[str, Estimate]
    """Share of each method's maps on the mark, over those images; empty with fewer than ten."""
    even: float
    """Share of a uniform map."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        shares = {method: share._asdict() for method, share in self.shares.items()}
        return {**self._asdict(), "shares": shares}


def check_shortcut(
    model: VisionTransformer,
    images: ImageSet,
    prepare: Callable[[Tensor], Tensor],
    methods: Sequence[Method | MapSettings],
    *,
    seed: int = 0,
) -> Shortcut:
    """Measure whether maps point at the mark on images where the mark decides.

    Those images have the mark of another class, and the model predicts that class: so it is known
    what the model used.

    Args:
        model: in evaluation mode, trained on shapes with ``shortcut``.
        images: without marks.
        prepare: converts uint8 images to the model's input, on its device.
        methods: the methods to measure.
        seed: for the choice of the other classes.
    """
    labels_B, n_classes = images.labels_B, len(images.classes)
    away_B = torch.randint(1, n_classes, labels_B.shape, generator=rng.generator(seed, "sanity"))
    others_B = (labels_B + away_B) % n_classes
    marked = {
        "own": add_marks(images, labels_B), "none": images, "another": add_marks(images, others_B)
    }  # fmt: skip
    inputs = {name: prepare(each.raw_BCHW) for name, each in marked.items()}
    predicted = {name: predict_classes(model, each) for name, each in inputs.items()}
    accuracies = {name: (p == labels_B).double().mean().item() for name, p in predicted.items()}
    decided_B = predicted["another"] == others_B
    mark_HW = mark_mask(model.config.image_hw).float()
    shown_BCHW = inputs["another"][decided_B.to(inputs["another"].device)]
    shares: dict[str, Estimate] = {}
    for settings in settings_of_all(methods) if len(shown_BCHW) >= FEWEST_IMAGES else ():
        maps = compute_maps(model, shown_BCHW, settings)
        share_B = _share_inside(maps.values_BLGJ[:, -1], mark_HW)
        shares[settings.variant] = estimate_mean(share_B)
    return Shortcut(accuracies, len(shown_BCHW), shares, mark_HW.mean().item())
