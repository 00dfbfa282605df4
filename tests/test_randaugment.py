"""RandAugment: every operation against Pillow's own, byte for byte; the draws; the strengths."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vitrail.data import augment
from vitrail.data.augment import BINS, OPERATIONS, rand_augment, strength
from vitrail.data.shapes import draw_shapes

H, W = 29, 37


def affine(picture: Image.Image, *terms: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, terms)


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Identity": lambda p, s: p,
    "ShearX": lambda p, s: affine(p, 1, s, 0, 0, 1, 0),
    "ShearY": lambda p, s: affine(p, 1, 0, 0, s, 1, 0),
    "TranslateX": lambda p, s: affine(p, 1, 0, -int(s), 0, 1, 0),
    "TranslateY": lambda p, s: affine(p, 1, 0, 0, 0, 1, -int(s)),
    "Rotate": lambda p, s: p.rotate(s),
    "Brightness": lambda p, s: ImageEnhance.Brightness(p).enhance(1 + s),
    "Color": lambda p, s: ImageEnhance.Color(p).enhance(1 + s),
    "Contrast": lambda p, s: ImageEnhance.Contrast(p).enhance(1 + s),
    "Sharpness": lambda p, s: ImageEnhance.Sharpness(p).enhance(1 + s),
    "Posterize": lambda p, s: ImageOps.posterize(p, int(s)),
    "Solarize": lambda p, s: ImageOps.solarize(p, s),
    "AutoContrast": lambda p, s: ImageOps.autocontrast(p),
    "Equalize": lambda p, s: ImageOps.equalize(p),
}


def pictures(channels: int) -> Tensor:
    """Noise, few levels, one level, a ramp, a narrow range, drawn shapes: nothing is square."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randint(256, (3, channels, H, W), generator=generator)
    few = torch.randint(2, (1, channels, H, W), generator=generator) * 93 + 50
    flat = torch.full((1, channels, H, W), 201)
    ramp = (torch.arange(H)[:, None] * 3 + torch.arange(W) * 4).expand(1, channels, H, W)
    shapes = draw_shapes(10, seed=5).raw_BCHW[:, :channels, 3:].repeat(1, 1, 1, 2)[..., :W]
    parts = [noise, few, flat, ramp, noise // 6 + 90, shapes]
    return torch.cat([part.to(torch.uint8) for part in parts])


def by_pillow(name: str, raw_BCHW: Tensor, strength_B: Tensor) -> Tensor:
    changed = []
    for raw_CHW, value in zip(raw_BCHW, strength_B.tolist(), strict=True):
        array = raw_CHW.permute(1, 2, 0).numpy()
        picture = Image.fromarray(array[..., 0] if len(raw_CHW) == 1 else array)
        array = np.array(PILLOW[name](picture, value)).reshape(H, W, -1)
        changed.append(torch.from_numpy(array).permute(2, 0, 1))
    return torch.stack(changed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_pillows_bytes(name: str, channels: int) -> None:
    raw_BCHW = pictures(channels)
    for magnitude in (0, 1, 4, 9, 10, 17, 23, 30):
        value, signed = strength(name, magnitude, (H, W))
        for sign in (1, -1) if signed else (1,):
            # A different strength for every image shows that none takes its neighbour's.
            share_B = torch.linspace(1, 0.5, len(raw_BCHW), dtype=torch.float64)
            strength_B = sign * value * (share_B if signed else torch.ones_like(share_B))
            ours = OPERATIONS[name](raw_BCHW, strength_B)
            assert ours.dtype == torch.uint8
            assert torch.equal(ours, by_pillow(name, raw_BCHW, strength_B)), (magnitude, sign)


def test_an_operation_does_not_change_its_input() -> None:
    raw_BCHW = pictures(3)
    before = raw_BCHW.clone()
    for name, operation in OPERATIONS.items():
        value, _ = strength(name, 21, (H, W))
        operation(raw_BCHW, torch.full((len(raw_BCHW),), value, dtype=torch.float64))
        assert torch.equal(raw_BCHW, before), name
    rand_augment(raw_BCHW, torch.Generator().manual_seed(1), 3, 21)
    assert torch.equal(raw_BCHW, before)


def test_strengths_are_the_papers() -> None:
    sides = (H, W)
    at_9 = {name: strength(name, 9, sides)[0] for name in OPERATIONS}
    expected = {
        "Identity": 0, "ShearX": 0.09, "ShearY": 0.09, "Rotate": 9,
        "TranslateX": 150 / 331 * W * 0.3, "TranslateY": 150 / 331 * H * 0.3,
        "Brightness": 0.27, "Color": 0.27, "Contrast": 0.27, "Sharpness": 0.27,
        "Posterize": 7, "Solarize": 178.5, "AutoContrast": 0, "Equalize": 0,
    }  # fmt: skip
    assert at_9 == pytest.approx(expected)
    signed = [name for name in OPERATIONS if strength(name, 9, sides)[1]]
    assert signed == list(OPERATIONS)[1:10]
    bits = [strength("Posterize", m, sides)[0] for m in range(BINS)]
    assert bits == (8 - (torch.arange(BINS) / 7.5).round()).tolist()
    # Where 255 (1 - m / 30) is an integer, a byte at the threshold itself must be inverted.
    assert [strength("Solarize", m, sides)[0] for m in (0, 10, 20, 30)] == [255, 170, 85, 0]


def test_each_image_and_slot_draws_one_operation_uniformly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_images, n_ops, seen = 5000, 2, dict.fromkeys(OPERATIONS, 0)
    signs = []

    def counting(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def operation(raw_BCHW: Tensor, strength_B: Tensor) -> Tensor:
            seen[name] += len(raw_BCHW)
            if strength(name, 9, (2, 3))[1]:
                signs.append(strength_B.sign())
            return raw_BCHW

        return operation

    monkeypatch.setattr(augment, "OPERATIONS", {name: counting(name) for name in seen})
    raw_BCHW = torch.zeros(n_images, 1, 2, 3, dtype=torch.uint8)
    rand_augment(raw_BCHW, torch.Generator().manual_seed(7), n_ops, 9)
    assert sum(seen.values()) == n_images * n_ops
    mean = n_images * n_ops / len(OPERATIONS)
    assert all(abs(count - mean) < 5 * math.sqrt(mean) for count in seen.values()), seen
    assert abs(torch.cat(signs).mean()) < 0.06


def test_the_result_is_pillows_operations_in_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw_BCHW = pictures(3).repeat(4, 1, 1, 1)
    ours = rand_augment(raw_BCHW, torch.Generator().manual_seed(2), 2, 13)
    theirs = {name: lambda r, s, name=name: by_pillow(name, r, s) for name in OPERATIONS}
    monkeypatch.setattr(augment, "OPERATIONS", theirs)
    assert torch.equal(ours, rand_augment(raw_BCHW, torch.Generator().manual_seed(2), 2, 13))
    again = rand_augment(raw_BCHW, torch.Generator().manual_seed(3), 2, 13)
    assert not torch.equal(ours, again)
    assert (ours != raw_BCHW).flatten(1).any(1).float().mean() > 0.8


def test_tiny_images_pass_through_every_operation() -> None:
    raw_BCHW = torch.randint(256, (2, 3, 2, 1), dtype=torch.uint8)
    for name, operation in OPERATIONS.items():
        strength_B = torch.full((2,), strength(name, 9, (2, 1))[0], dtype=torch.float64)
        assert operation(raw_BCHW, strength_B).shape == raw_BCHW.shape
