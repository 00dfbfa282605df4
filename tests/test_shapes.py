"""The generated shapes: the same bytes everywhere, exact masks, not solvable by simple means."""

import hashlib

import pytest
import torch
from torch.nn import functional as F

from vitrail.config.settings import DataConfig
from vitrail.data import datasets
from vitrail.data.images import ImageSet
from vitrail.data.shapes import draw_shapes
from vitrail.data.shortcut import COLORS, add_marks, add_shortcut, mark_mask
from vitrail.errors import ConfigError

DIGEST = "08e181cd518ca89cbcf83ebb6e85fcc51c7654a021f8a242b0c408b6761962d0"
"""SHA-256 of the bytes and masks of 70 images of seed 3, on every platform."""


@pytest.fixture(scope="module")
def splits() -> dict[str, ImageSet]:
    """Both splits as used in training."""
    return {"train": datasets.load_shapes("train"), "test": datasets.load_shapes("test")}


@pytest.fixture(scope="module")
def shapes(splits: dict[str, ImageSet]) -> ImageSet:
    return splits["train"].take(torch.arange(4000))


@pytest.fixture(scope="module")
def unseen(splits: dict[str, ImageSet]) -> ImageSet:
    return splits["test"].take(torch.arange(1000))


def accuracy_of_ridge(train: torch.Tensor, test: torch.Tensor, sets: list[ImageSet]) -> float:
    """Test accuracy of ridge regression with weak regularization."""
    train, test = (F.pad(x, (0, 1), value=1.0) for x in (train, test))
    targets_BY = F.one_hot(sets[0].labels_B).float() - 0.1
    penalty = 3 * train.shape[0] ** 0.5 * torch.eye(train.shape[1])
    weights = torch.linalg.solve(train.T @ train + penalty, train.T @ targets_BY)
    return float(((test @ weights).argmax(1) == sets[1].labels_B).float().mean())


def test_a_seed_gives_the_same_bytes_everywhere() -> None:
    drawn = draw_shapes(70, seed=3)
    assert drawn.masks_BHW is not None
    digest = hashlib.sha256(drawn.raw_BCHW.numpy().tobytes())
    digest.update(drawn.masks_BHW.numpy().tobytes())
    assert digest.hexdigest() == DIGEST


def test_an_image_depends_on_its_seed_and_number_alone() -> None:
    many, few = draw_shapes(613, seed=3), draw_shapes(517, seed=3)
    assert torch.equal(many.raw_BCHW[:517], few.raw_BCHW)
    assert len(many.raw_BCHW.flatten(1).unique(dim=0)) == 613
    assert not torch.equal(draw_shapes(13, seed=4).raw_BCHW, few.raw_BCHW[:13])


def test_the_splits_are_bytes_balanced_and_disjoint(splits: dict[str, ImageSet]) -> None:
    train, test = splits["train"], splits["test"]
    assert train.raw_BCHW.shape == (10_000, 3, 32, 32)
    assert test.raw_BCHW.shape == (2_000, 3, 32, 32)
    assert train.raw_BCHW.dtype == torch.uint8
    assert train.labels_B.bincount().tolist() == [1000] * 10
    assert len(set(train.classes)) == 10
    both = torch.cat([train.raw_BCHW, test.raw_BCHW])[:, :, 16].flatten(1)
    assert len(both.unique(dim=0)) == 12_000


def test_masks_are_one_object_of_reasonable_size(shapes: ImageSet) -> None:
    masks_BHW = shapes.masks_BHW
    assert masks_BHW is not None
    assert masks_BHW.dtype == torch.bool
    for along in (1, 2):
        extent_B = masks_BHW.any(along).sum(1)
        assert extent_B.min() >= 3
        assert extent_B.max() <= 25
    share_B = masks_BHW.flatten(1).float().mean(1)
    assert share_B.min() > 0.03
    assert share_B.max() < 0.45


def test_an_object_differs_from_the_background_around_it(shapes: ImageSet) -> None:
    assert shapes.masks_BHW is not None
    mask_B1HW = shapes.masks_BHW[:, None].float()
    beside_B1HW = F.max_pool2d(mask_B1HW, 5, stride=1, padding=2) - mask_B1HW
    raw_BCHW = shapes.raw_BCHW.float()

    def mean_color(weight_B1HW: torch.Tensor) -> torch.Tensor:
        return (raw_BCHW * weight_B1HW).sum((2, 3)) / weight_B1HW.sum((2, 3))

    contrast_B = (mean_color(mask_B1HW) - mean_color(beside_B1HW)).abs().sum(1)
    assert contrast_B.quantile(0.01) > 60


def test_pixels_alone_do_not_reveal_the_class(shapes: ImageSet, unseen: ImageSet) -> None:
    sets = [shapes, unseen]
    pixels = [s.raw_BCHW.float().flatten(1) / 128 - 1 for s in sets]
    assert accuracy_of_ridge(*pixels, sets) < 0.45


def test_colors_alone_do_not_reveal_the_class(shapes: ImageSet, unseen: ImageSet) -> None:
    colors, unseen_colors = (s.raw_BCHW.float().mean((2, 3)) for s in (shapes, unseen))
    nearest_B = torch.cdist(unseen_colors, colors).argmin(1)
    assert (shapes.labels_B[nearest_B] == unseen.labels_B).float().mean() < 0.16


def test_the_masks_reveal_more_than_chance(shapes: ImageSet, unseen: ImageSet) -> None:
    """The labels belong to the pictures: the area of the object alone is informative."""
    sets = [shapes, unseen]
    areas = [s.masks_BHW.flatten(1).float().mean(1) for s in sets if s.masks_BHW is not None]
    features = [torch.stack([a, a**2, a**3], 1) * 10 for a in areas]
    assert accuracy_of_ridge(*features, sets) > 0.15


def test_a_mark_is_a_quarter_of_the_sides_and_has_the_color_of_its_class() -> None:
    plain = draw_shapes(10, seed=3)
    misleading = add_marks(plain, plain.labels_B.roll(1))
    mask_HW = mark_mask((32, 32))
    assert mask_HW.sum() == 64
    assert mask_HW[:8, :8].all()
    assert torch.equal(misleading.raw_BCHW[:, :, ~mask_HW], plain.raw_BCHW[:, :, ~mask_HW])
    assert torch.equal(misleading.raw_BCHW[:, :, 7, 7], COLORS.roll(1, 0))
    assert (
        len(add_marks(plain.with_channels(1), plain.labels_B).raw_BCHW[:, 0, 0, 0].unique()) == 10
    )


def test_a_shortcut_marks_a_fraction_of_the_images_with_their_own_class() -> None:
    plain = draw_shapes(500, seed=3)
    marked = add_shortcut(plain, 0.3)
    changed_B = (marked.raw_BCHW != plain.raw_BCHW).flatten(1).any(1)
    assert 110 < changed_B.sum() < 190
    assert torch.equal(marked.raw_BCHW[changed_B, :, 0, 0], COLORS[plain.labels_B[changed_B]])
    loaded = datasets.load_data(DataConfig(shortcut=1), ["validation"]).images["validation"]
    assert torch.equal(loaded.raw_BCHW[:, :, 0, 0], COLORS[loaded.labels_B])
    with pytest.raises(ConfigError, match="shortcut applies to dataset shapes only"):
        DataConfig(dataset="cifar10", shortcut=0.5)
