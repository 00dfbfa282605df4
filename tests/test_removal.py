"""Occlusion by windows and Shapley values: against models whose answer is known."""

import itertools

import pytest
import torch
from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.explain.map_settings import MapSettings
from vitrail.explain.removal import compute, count_passes, occlusion, shapley
from vitrail.model.vit import VisionTransformer

CONFIG = ModelConfig(
    image_size=(8, 12), patch_size=4, n_channels=1, n_classes=2, embed_dim=8, n_layers=1,
    n_attention_heads=2,
)  # fmt: skip


class Additive(VisionTransformer):
    """The first logit is a weighted sum of the patches' sums, and a product of the first two."""

    weights_N = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 1.5])
    product = 0.0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        patches = images_BCHW.unfold(2, 4, 4).unfold(3, 4, 4).sum((-1, -2)).flatten(1)
        first_B = patches @ self.weights_N + self.product * patches[:, 0] * patches[:, 1]
        return torch.stack([first_B, torch.zeros_like(first_B)], dim=1)


def first_logit(logits_XY: Tensor, _image_X: Tensor) -> Tensor:
    return logits_XY[:, 0]


@pytest.fixture
def images_BCHW() -> Tensor:
    return torch.randn(3, 1, 8, 12, generator=torch.Generator().manual_seed(3))


def lost(images_BCHW: Tensor) -> Tensor:
    """What hiding each patch alone takes from the additive model's logit, (B, 2, 3)."""
    sums = images_BCHW.unfold(2, 4, 4).unfold(3, 4, 4).sum((-1, -2)).flatten(1)
    colors = 16 * images_BCHW.mean((1, 2, 3))
    return ((sums - colors[:, None]) * Additive.weights_N).view(-1, 2, 3)


def test_one_patch_at_a_time(images_BCHW: Tensor) -> None:
    values = occlusion(Additive(CONFIG).eval(), images_BCHW, first_logit, window=1, chunk=4)
    torch.testing.assert_close(values, lost(images_BCHW), rtol=1e-4, atol=1e-4)


def test_windows_overhang_and_are_averaged(images_BCHW: Tensor) -> None:
    values = occlusion(Additive(CONFIG).eval(), images_BCHW, first_logit, window=2, chunk=5)
    single_BGJ = lost(images_BCHW)
    padded = torch.nn.functional.pad(single_BGJ, (1, 1, 1, 1))
    windows = padded[:, :-1, :-1] + padded[:, 1:, :-1] + padded[:, :-1, 1:] + padded[:, 1:, 1:]
    expected = (
        windows[:, :-1, :-1] + windows[:, 1:, :-1] + windows[:, :-1, 1:] + windows[:, 1:, 1:]
    ) / 4
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("passes", [2, 60])
def test_shapley_values_of_a_sum_are_its_terms_without_error(
    images_BCHW: Tensor, passes: int
) -> None:
    values, errors = shapley(
        Additive(CONFIG).eval(), images_BCHW, first_logit, window=1, passes=passes, chunk=7
    )
    torch.testing.assert_close(values, lost(images_BCHW), rtol=1e-3, atol=1e-3)
    if passes == 2:
        assert errors.isnan().all(), "one order and its reverse have no spread"
    else:
        assert errors.max() < 1e-3


def test_shapley_values_sum_to_the_difference_and_share_an_interaction(
    images_BCHW: Tensor,
) -> None:
    model = Additive(CONFIG).eval()
    model.product = 0.7
    values, errors = shapley(model, images_BCHW, first_logit, window=1, passes=400, chunk=64)
    blank_BCHW = images_BCHW.mean((2, 3), keepdim=True).expand_as(images_BCHW)
    difference = (model(images_BCHW) - model(blank_BCHW))[:, 0]
    torch.testing.assert_close(values.sum((1, 2)), difference, rtol=1e-3, atol=1e-3)
    exact = torch.zeros(3, 6)
    orders = list(itertools.permutations(range(6)))
    for order in orders[:: len(orders) // 720]:
        shown_BCHW = blank_BCHW.clone()
        before = model(shown_BCHW)[:, 0]
        for patch in order:
            row, column = divmod(patch, 3)
            area = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            shown_BCHW[area] = images_BCHW[area]
            now = model(shown_BCHW)[:, 0]
            exact[:, patch] += (now - before) / 720
            before = now
    # An order and its reverse show each of two interacting patches first once: exact already.
    torch.testing.assert_close(values.flatten(1), exact, rtol=1e-3, atol=1e-3)
    assert errors.max() < 1e-3


def test_squares_are_shown_at_once_and_shifted(images_BCHW: Tensor) -> None:
    values, errors = shapley(
        Additive(CONFIG).eval(), images_BCHW, first_logit, window=2, passes=2000, chunk=64
    )
    single_BGJ = lost(images_BCHW)
    expected = torch.zeros_like(single_BGJ)
    for rows, columns in itertools.product(([[0, 1]], [[0], [1]]), ([[0, 1], [2]], [[0], [1, 2]])):
        for ys, xs in itertools.product(rows, columns):
            square = (..., torch.tensor(ys)[:, None], torch.tensor(xs))
            expected[square] += single_BGJ[square].mean((1, 2), keepdim=True) / 4
    assert 0 < errors.max() < 0.1 * single_BGJ.abs().max(), "of the random shifts alone"
    assert ((values - expected).abs() < 4 * errors + 1e-3).all()
    torch.testing.assert_close(values.sum((1, 2)), single_BGJ.sum((1, 2)), rtol=1e-3, atol=1e-3)


def test_images_do_not_depend_on_each_other(images_BCHW: Tensor) -> None:
    torch.manual_seed(2)
    model = VisionTransformer(CONFIG).eval()
    for name in ("occlusion", "shapley"):
        parts = []
        for images in (images_BCHW, images_BCHW[1:2]):
            with torch.no_grad():
                if name == "occlusion":
                    found = occlusion(model, images, first_logit, window=2, chunk=5)
                else:
                    found = shapley(model, images, first_logit, window=2, passes=40, chunk=5)[0]
            parts.append(found)
        torch.testing.assert_close(parts[0][1:2], parts[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        MapSettings(method="occlusion", window=1), MapSettings(method="occlusion", window=3),
        MapSettings(method="shapley", passes=1), MapSettings(method="shapley", passes=45),
        MapSettings(method="shapley", passes=45, window=1),
    ],
    ids=lambda settings: settings.variant,
)  # fmt: skip
def test_passes_are_counted_in_advance(images_BCHW: Tensor, settings: MapSettings) -> None:
    model, passes = Additive(CONFIG).eval(), 0

    def count(_: object, __: object, logits_XY: Tensor) -> None:
        nonlocal passes
        passes += len(logits_XY)

    model.register_forward_hook(count)
    compute(model, images_BCHW[:1], first_logit, settings)
    assert passes == count_passes(CONFIG.grid_GJ, settings)


@pytest.mark.parametrize(("window", "squares"), [(1, 64), (2, 25), (3, 16)])
def test_orders_take_as_many_passes_as_permitted(window: int, squares: int) -> None:
    for passes in (256, 511, 512):
        settings = MapSettings(method="shapley", window=window, passes=passes)
        assert passes - 2 * (squares - 1) < count_passes((8, 8), settings) <= passes
