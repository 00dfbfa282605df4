"""Crop, flip, erasing, mixup, cutmix; and batches as a function of the step."""

import dataclasses

import pytest
import torch
from torch import Tensor

from vitrail.config.settings import AugmentConfig, Config, DataConfig, RunConfig, TrainingConfig
from vitrail.data.augment import (
    _beta,
    cutmix,
    mixup,
    patch_drop,
    random_crop,
    random_erasing,
    random_flip,
)
from vitrail.data.batches import Batches
from vitrail.data.fills import FILLS, fill_images
from vitrail.data.images import ImageSet, normalize
from vitrail.errors import DataError
from vitrail.runtime import rng


def numbered(count: int, height: int = 9, width: int = 13) -> Tensor:
    """Images of bytes that are all different within an image, and never 0."""
    size = 3 * height * width
    plain = torch.arange(size).remainder(251).add(1).to(torch.uint8).view(3, height, width)
    return plain.expand(count, -1, -1, -1).contiguous()


def generator() -> torch.Generator:
    return rng.generator(7, "augment")


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    raw_BCHW = numbered(61)
    padded_BCHW = torch.nn.functional.pad(raw_BCHW, (3, 3, 3, 3))
    windows = [padded_BCHW[0, :, y : y + 9, x : x + 13] for y in range(7) for x in range(7)]
    seen = set()
    for image in random_crop(raw_BCHW, generator(), 3):
        matches = [i for i, window in enumerate(windows) if torch.equal(image, window)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 25


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    raw_BCHW = numbered(401)
    flipped_BCHW = random_flip(raw_BCHW, generator())
    mirrored_B = (flipped_BCHW == raw_BCHW.flip(3)).flatten(1).all(1)
    kept_B = (flipped_BCHW == raw_BCHW).flatten(1).all(1)
    assert (mirrored_B ^ kept_B).all()
    assert 150 < mirrored_B.sum() < 250


def test_erasing_overwrites_a_rectangle_of_the_given_share() -> None:
    raw_BCHW = torch.zeros(503, 3, 31, 37, dtype=torch.uint8)
    erased_BHW = random_erasing(raw_BCHW, generator(), 0.25).amax(1) > 0
    areas_B = erased_BHW.flatten(1).float().mean(1)
    assert 0.2 < (areas_B > 0).float().mean() < 0.3
    assert 0.1 < areas_B[areas_B > 0].mean() < 0.25
    assert areas_B.max() < 0.4
    for mask_HW in erased_BHW[areas_B > 0][:20]:
        rows, columns = mask_HW.any(1), mask_HW.any(0)
        assert mask_HW[rows][:, columns].float().mean() > 0.95  # noise may hold a black pixel


def test_mixup_mixes_images_and_targets_in_the_same_shares() -> None:
    targets_BY = torch.eye(11)
    images_BCHW = targets_BY[:, None, None].expand(11, 3, 5, 11).contiguous()
    mixed_BCHW, mixed_BY = mixup(images_BCHW, targets_BY, generator(), 0.8)
    torch.testing.assert_close(mixed_BCHW[:, 0, 0], mixed_BY)
    torch.testing.assert_close(mixed_BY.sum(1), torch.ones(11))
    assert mixed_BY.max() < 1


def test_cutmix_mixes_targets_by_the_area_pasted() -> None:
    targets_BY = torch.eye(11)
    images_BCHW = torch.arange(11.0).view(11, 1, 1, 1).expand(11, 3, 15, 17)
    for seed in range(20):
        generator_ = rng.generator(seed, "augment")
        mixed_BCHW, mixed_BY = cutmix(images_BCHW, targets_BY, generator_, 1.0)
        for index in range(11):
            own = (mixed_BCHW[index, 0] == index).float().mean()
            assert mixed_BY[index, index] == pytest.approx(own.item(), abs=1e-5)


def batches(config: AugmentConfig, count: int = 23, batch_size: int = 5) -> Batches:
    raw_BCHW = numbered(count, 8, 12) // 2 + torch.arange(count, dtype=torch.uint8).view(
        -1, 1, 1, 1
    )
    images = ImageSet(raw_BCHW, torch.arange(count) % 3, ("a", "b", "c"))
    settings = Config(
        data=DataConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        augment=config,
        training=TrainingConfig(batch_size=batch_size, epochs=4),
        run=RunConfig(seed=3),
    )
    return Batches(images, settings, device=torch.device("cpu"))


PLAIN = AugmentConfig(crop_padding=0, flip="none")


def test_an_epoch_visits_every_image_once() -> None:
    made = batches(PLAIN)
    assert made.steps_per_epoch == 5
    first = torch.cat([made(step).images_BCHW for step in range(5)])
    second = torch.cat([made(step).images_BCHW for step in range(5, 10)])
    assert len(first) == 23
    assert len(first.flatten(1).unique(dim=0)) == 23
    assert torch.equal(first.flatten(1).unique(dim=0), second.flatten(1).unique(dim=0))
    assert not torch.equal(first, second)


def test_a_batch_depends_on_the_step_alone() -> None:
    config = AugmentConfig(
        randaugment_ops=1, random_erasing=0.5, mixup=0.3, cutmix=0.3, patch_drop=0.5
    )
    walked, alone = batches(config), batches(config)
    seen = [walked(step) for step in range(12)]
    for step in (11, 3, 7):
        for one, other in zip(seen[step], alone(step), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        {"crop_padding": 2},
        {"flip": "random"},
        {"flip": "alternating"},
        {"randaugment_ops": 2},
        {"randaugment_ops": 2, "randaugment_magnitude": 25},
        {"random_erasing": 1.0},
        {"mixup": 1.0},
        {"cutmix": 1.0},
        {"patch_drop": 1.0},
    ],
    ids=str,
)
def test_every_setting_changes_the_batch(change: dict[str, float]) -> None:
    plain = batches(PLAIN, batch_size=23)(0)
    changed = batches(dataclasses.replace(PLAIN, **change), batch_size=23)(0)  # type: ignore[arg-type]
    assert not torch.equal(plain.images_BCHW, changed.images_BCHW)
    assert torch.equal(plain.labels_B, changed.labels_B)


def test_every_image_is_mirrored_in_every_second_epoch() -> None:
    made = batches(dataclasses.replace(PLAIN, flip="alternating"), count=101)
    plain_BCHW = normalize(made.raw_BCHW, made.mean, made.std)
    mirrored = torch.empty(3, 101, dtype=torch.bool)
    for epoch in range(3):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        for image_CHW in torch.cat([made(step).images_BCHW for step in steps]):
            (kept,) = (plain_BCHW == image_CHW).flatten(1).all(1).nonzero().flatten().tolist() or [
                None
            ]
            same_B = (plain_BCHW.flip(3) == image_CHW).flatten(1).all(1)
            index = int(same_B.nonzero()) if kept is None else kept
            mirrored[epoch, index] = kept is None
    assert 35 < mirrored[0].sum() < 66
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2])


def test_strong_augmentation_and_mixing_stop_where_the_settings_say() -> None:
    strong = AugmentConfig(
        crop_padding=0, flip="none", randaugment_ops=1, randaugment_magnitude=30,
        random_erasing=1.0, strong_until=0.5, cutmix=1.0, mix_until=0.75,
    )  # fmt: skip
    made, plain = batches(strong, batch_size=23), batches(PLAIN, batch_size=23)  # one step an epoch
    for step, (augmented, mixed) in enumerate(((1, 1), (1, 1), (0, 1), (0, 0))):
        batch, bare = made(step), plain(step)
        assert (len(batch.targets_BY.unique()) > 2) == bool(mixed), step
        assert torch.equal(batch.images_BCHW, bare.images_BCHW) == (not augmented and not mixed)
    unmixed = batches(dataclasses.replace(strong, cutmix=0.0), batch_size=23)
    assert not torch.equal(unmixed(1).images_BCHW, plain(1).images_BCHW)
    assert torch.equal(unmixed(2).images_BCHW, plain(2).images_BCHW)


def test_a_share_of_the_batches_is_mixed() -> None:
    config = dataclasses.replace(PLAIN, mixup=1.0, mix_probability=0.3)
    made = batches(config, batch_size=2, count=50)
    plain = batches(PLAIN, batch_size=2, count=50)
    mixed = sum(not torch.equal(made(s).images_BCHW, plain(s).images_BCHW) for s in range(100))
    # Half of the pairs are their own partners, and do not change.
    assert 5 < mixed < 35


def test_dropped_patches_hold_one_of_the_fills_and_the_others_stay() -> None:
    images_BCHW = torch.rand(97, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    seen = set()
    for seed in range(8):
        made_BCHW = patch_drop(images_BCHW, rng.generator(seed, "patch_drop"), 4)
        patches_BNX, kept_BNX = (
            x.unfold(2, 4, 4).unfold(3, 4, 4).movedim(1, 3).reshape(97, 6, 48)
            for x in (made_BCHW, images_BCHW)
        )
        dropped_BN = (patches_BNX != kept_BNX).any(2)
        for fill in FILLS:
            filled_BCHW = fill_images(images_BCHW, fill)
            filled_BNX = filled_BCHW.unfold(2, 4, 4).unfold(3, 4, 4).movedim(1, 3).flatten(3)
            if torch.equal(patches_BNX[dropped_BN], filled_BNX.reshape(97, 6, 48)[dropped_BN]):
                seen.add(fill)
        assert 0.4 < dropped_BN.float().mean() < 0.6
        assert dropped_BN.sum(1).unique().tolist() == list(range(7))  # every share occurs
    assert seen == set(FILLS)


def test_patches_are_dropped_in_a_share_of_the_batches_and_draw_from_their_own_stream() -> None:
    made = batches(dataclasses.replace(PLAIN, patch_drop=0.3), batch_size=2, count=50)
    plain = batches(PLAIN, batch_size=2, count=50)
    dropped = sum(not torch.equal(made(s).images_BCHW, plain(s).images_BCHW) for s in range(100))
    assert 15 < dropped < 45
    # The other augmentations are those of a run without it.
    both = AugmentConfig(crop_padding=0, flip="none", mixup=0.5, random_erasing=0.5)
    one = batches(both, batch_size=5)
    other = batches(dataclasses.replace(both, patch_drop=1e-9), batch_size=5)
    assert all(torch.equal(one(s).images_BCHW, other(s).images_BCHW) for s in range(9))


def test_images_are_normalized_and_targets_one_hot() -> None:
    raw_BCHW = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    images_BCHW = normalize(raw_BCHW, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    torch.testing.assert_close(images_BCHW.flatten(), torch.tensor([-2.0, -1.0, 1.0]))
    gray_BCHW = normalize(raw_BCHW[:, 1:2], (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    torch.testing.assert_close(gray_BCHW.flatten(), torch.tensor([-1.0]))
    batch = batches(PLAIN)(1)
    assert torch.equal(batch.targets_BY.argmax(1), batch.labels_B)
    assert torch.equal(batch.targets_BY.sum(1), torch.ones(5))


def test_no_images_is_refused() -> None:
    with pytest.raises(DataError, match="no images to train on"):
        batches(PLAIN, count=0)


def test_erased_and_pasted_rectangles_lie_anywhere_and_have_many_shapes() -> None:
    raw_BCHW = torch.zeros(503, 1, 31, 37, dtype=torch.uint8)
    erased_BHW = random_erasing(raw_BCHW, rng.generator(7, "augment"), 1.0)[:, 0] > 0
    quarters = [half.chunk(2, 2) for half in erased_BHW.float().chunk(2, 1)]
    assert min(part.mean() for half in quarters for part in half) > 0.1
    heights_B, widths_B = erased_BHW.any(2).sum(1), erased_BHW.any(1).sum(1)
    ratio_B = heights_B / widths_B
    assert ratio_B.quantile(0.1) < 0.6
    assert ratio_B.quantile(0.9) > 1.7
    tops, images_BCHW = set(), torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 30, 34)
    for seed in range(40):
        mixed_BCHW, _ = cutmix(images_BCHW, torch.eye(2), rng.generator(seed, "augment"), 1.0)
        rows = (mixed_BCHW[0, 0] == 1).any(1).nonzero().flatten()
        if 0 < len(rows) < 30:
            tops.add(round((rows[0] + rows[-1]).item() / 2))
    assert len(tops) > 5


def test_alpha_sets_how_evenly_images_are_mixed() -> None:
    generator = torch.Generator().manual_seed(1)
    for alpha in (0.2, 1.0, 5.0):
        weights = torch.tensor([_beta(alpha, generator) for _ in range(2000)])
        assert weights.mean().item() == pytest.approx(0.5, abs=0.04)
        assert weights.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_mixup_and_cutmix_take_turns() -> None:
    made = batches(dataclasses.replace(PLAIN, mixup=1.0, cutmix=1.0), batch_size=5, count=100)
    plain = batches(PLAIN, batch_size=5, count=100)
    pasted = 0
    steps = 80
    for step in range(steps):
        mixed, all_ = made(step).images_BCHW, plain(step).images_BCHW
        # Pasted pixels are pixels of an image of the batch, unchanged.
        known = (mixed[:, None] == all_[None]).all(2).any(1)
        pasted += bool(known.all())
    assert 20 < pasted < 60
