"""The split between training and validation: fixed, exact, stratified."""

import hashlib

import pytest
import torch

from vitrail.data.images import ImageSet
from vitrail.errors import ConfigError


def unequal_labels() -> torch.Tensor:
    """Classes of 1, 3, 7, 29 and 101 images, mixed."""
    labels = torch.arange(5).repeat_interleave(torch.tensor([1, 3, 7, 29, 101]))
    return labels[torch.arange(141) * 50 % 141]


def split_indices(labels: torch.Tensor, given: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of both parts, each of one pixel that holds its index."""
    raw = torch.arange(len(labels)).view(-1, 1, 1, 1)
    images = ImageSet(raw, labels, tuple(map(str, range(10))))
    train, validation = images.split(given)
    assert torch.equal(train.labels_B, labels[train.raw_BCHW.flatten()])
    return train.raw_BCHW.flatten(), validation.raw_BCHW.flatten()


@pytest.mark.parametrize(("given", "wanted"), [(None, 14), (0, 0), (1, 1), (37, 37), (140, 140)])
def test_splits_exactly_and_loses_no_image(given: int | None, wanted: int) -> None:
    train, validation = split_indices(unequal_labels(), given)
    assert len(validation) == wanted
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(141))
    assert torch.equal(train, train.sort().values)
    assert torch.equal(validation, validation.sort().values)


@pytest.mark.parametrize("wanted", [5, 14, 37, 71, 139])
def test_each_class_gives_its_share_to_within_one(wanted: int) -> None:
    labels = unequal_labels()
    _, validation = split_indices(labels, wanted)
    given = labels[validation].bincount(minlength=5)
    exact = labels.bincount() * wanted / len(labels)
    assert (given - exact).abs().max() < 1


def test_the_largest_fractions_are_rounded_up() -> None:
    labels = unequal_labels()
    _, validation = split_indices(labels, 14)  # exact: 0.10, 0.30, 0.70, 2.88 and 10.03
    assert labels[validation].bincount(minlength=5).tolist() == [0, 0, 1, 3, 10]


def test_never_changes() -> None:
    labels = torch.arange(50_000) * 7 % 10
    _, validation = split_indices(labels, None)
    assert labels[validation].bincount().tolist() == [500] * 10
    digest = hashlib.sha256(validation.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "ade44efb810a4f8a"


def test_does_not_depend_on_what_was_drawn_before() -> None:
    labels = unequal_labels()
    first = split_indices(labels, 20)[1]
    torch.rand(13)
    assert torch.equal(split_indices(labels, 20)[1], first)


def test_refuses_to_hold_out_every_image() -> None:
    with pytest.raises(ConfigError, match=r"^validation_images is 141, but there are 141 "):
        split_indices(unequal_labels(), 141)
