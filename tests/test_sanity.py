"""Randomized weights and mosaics: what the checks report for maps whose answer is known."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.data.images import ImageSet
from vitrail.data.shortcut import COLORS
from vitrail.explain import methods, removal
from vitrail.explain.map_metrics import Estimate
from vitrail.explain.map_settings import MapSettings
from vitrail.explain.methods import compute_maps
from vitrail.explain.sanity import (
    Sanity,
    _reset,
    check_methods,
    check_shortcut,
    enlarge,
    make_mosaics,
    randomization,
    rank_correlation,
    shares_in_tiles,
)
from vitrail.model.vit import Block, VisionTransformer


@pytest.fixture
def model() -> VisionTransformer:
    config = ModelConfig(
        image_size=16, patch_size=4, embed_dim=24, n_layers=2, n_attention_heads=3, n_classes=5,
        pool="mean", head="linear",
    )  # fmt: skip
    torch.manual_seed(1)
    model = VisionTransformer(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5)
    return model


def test_rank_correlation_agrees_with_the_formula_and_shares_ranks() -> None:
    one = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 2.0, 0.0, 5.0], [3.0] * 5])
    other = torch.tensor([[5.0, 6.0, 7.0, 8.0, 7.0], [2.0, 3.0, 4.0, 1.0, 9.0], [1.0, 2, 3, 4, 5]])
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties; with them Pearson's correlation of mean ranks.
    assert rank_correlation(one, other)[:2].tolist() == pytest.approx([0.8208, 0.9747], abs=1e-4)
    assert rank_correlation(one, other)[2] == 0
    assert rank_correlation(one, -one)[0] == -1


def test_maps_lose_their_order_from_head_to_stem(model: VisionTransformer) -> None:
    images_BCHW = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = MapSettings(method="balanced", resolution="patch")
    found = randomization(model, images_BCHW, settings)
    assert list(found) == ["trained", "head", "block 2", "block 1", "stem"]
    assert found["trained"].mean == 1
    assert abs(found["stem"].mean) < 0.4
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the model itself is not changed"
    assert randomization(model, images_BCHW, settings) == found
    # Attention does not read the head.
    attention = randomization(model, images_BCHW, MapSettings())
    assert attention["head"].mean == pytest.approx(1)
    assert attention["block 2"].mean < 0.9


def quadrants(mosaic_CHW: Tensor) -> list[float]:
    return [
        mosaic_CHW[0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].mean().item()
        for row in (0, 1)
        for column in (0, 1)
    ]


def test_mosaics_hold_four_classes_in_order() -> None:
    labels_B = torch.arange(20) % 5
    images_BCHW = labels_B.float().view(-1, 1, 1, 1).expand(20, 3, 16, 16)
    mosaics_MCHW, classes_M4 = make_mosaics(images_BCHW, labels_B)
    assert mosaics_MCHW.shape == (5, 3, 32, 32)
    for mosaic_CHW, classes_4 in zip(mosaics_MCHW, classes_M4.tolist(), strict=True):
        assert len(set(classes_4)) == 4
        assert quadrants(mosaic_CHW) == classes_4
    assert len(classes_M4.unique(dim=0)) > 3
    assert len(make_mosaics(images_BCHW, torch.arange(20) % 3)[0]) == 0
    assert make_mosaics(images_BCHW[..., :15], labels_B)[0].shape == (5, 3, 32, 30)
    # Of 17, 1, 1 and 1 images, the small classes permit one mosaic.
    assert len(make_mosaics(images_BCHW, (torch.arange(20) - 16).clamp(min=0))[0]) == 1


def test_no_image_is_in_two_mosaics() -> None:
    images_BCHW = torch.arange(40.0).view(-1, 1, 1, 1).expand(40, 1, 4, 4)
    mosaics_MCHW, _ = make_mosaics(images_BCHW, torch.arange(40) % 4)
    assert mosaics_MCHW[:, :, ::4, ::4].flatten().sort().values.tolist() == list(range(40))


def test_randomization_reaches_positions_and_spares_the_global_generator(
    model: VisionTransformer,
) -> None:
    # Without the other parts: a model whose maps depend on its positions only.
    with torch.no_grad():
        model.stem.weight.zero_()
        model.position_ND.mul_(10)
    images_BCHW = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    state = torch.get_rng_state()
    found = randomization(model, images_BCHW, MapSettings(method="rollout"))
    assert torch.equal(torch.get_rng_state(), state)
    assert found["stem"] != found["block 1"]
    assert abs(found["stem"].mean) < 0.5


def test_all_weights_of_a_scaled_block_are_randomized() -> None:
    block = Block(ModelConfig(embed_dim=12, n_attention_heads=3, layer_scale=0.1))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(3)
    block.apply(partial(_reset, std=0.02))
    assert all((parameter != 3).all() for parameter in block.parameters())
    assert block.scale1.weight.tolist() == block.scale2.weight.tolist() == [pytest.approx(0.1)] * 12


def test_a_negligible_share_is_no_dependence_on_the_class(model: VisionTransformer) -> None:
    images_BCHW = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    checks = check_methods(model, images_BCHW, torch.arange(40) % 5, ("attention", "rollout"))
    for check in checks:
        assert check.in_tile is not None
        assert check.depends_on_class is False
    for share, depends in ((0.25 + 2e-8, False), (0.2505, False), (0.27, True)):
        assert Sanity("rollout", {}, Estimate(share, share, share)).depends_on_class is depends
    few = check_methods(model, images_BCHW[:12], torch.arange(12) % 5, ("attention", "shapley"))
    assert [check.method for check in few] == ["attention", "shapley"]
    assert few[0].in_tile is None


@pytest.mark.parametrize("position", ["learned", "sincos", "rope"])
def test_a_mosaic_is_read_at_its_own_size(position: str) -> None:
    config = ModelConfig(
        image_size=(8, 12), patch_size=4, embed_dim=24, n_layers=2, n_attention_heads=3,
        n_classes=5, position=position,
    )  # fmt: skip
    torch.manual_seed(1)
    model = VisionTransformer(config).eval()
    state = torch.get_rng_state()
    reader = enlarge(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert reader.config.grid_GJ == (4, 6)
    assert reader(torch.randn(2, 3, 16, 24)).shape == (2, 5)
    for name, tensor in model.state_dict().items():
        if name == "position_ND":  # interpolated
            grid_GJD = reader.state_dict()[name].view(4, 6, 24)
            torch.testing.assert_close(grid_GJD.mean((0, 1)), tensor.mean(0), atol=1e-2, rtol=0)
        else:
            assert torch.equal(reader.state_dict()[name], tensor)


def test_no_mosaics_are_read_of_images_that_would_be_too_large() -> None:
    config = ModelConfig(
        image_size=2052, patch_size=36, embed_dim=12, n_layers=1, n_attention_heads=1, n_classes=4,
        pool="mean", head="linear",
    )  # fmt: skip
    model = VisionTransformer(config).eval()
    assert enlarge(model) is None


def test_a_map_that_ignores_the_class_has_a_quarter_in_each_tile(
    model: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    images_BCHW = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    mosaics_MCHW, classes_M4 = make_mosaics(images_BCHW, torch.arange(40) % 5)
    settings = MapSettings(method="rollout")
    shares_M4 = shares_in_tiles(enlarge(model), mosaics_MCHW, classes_M4, settings)
    torch.testing.assert_close(shares_M4.sum(1), torch.ones(10).double())
    # Few at once, as the attention of four times the tokens takes sixteen times the memory.
    reader, seen = enlarge(model), []
    assert reader is not None
    reader.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(methods, "ATTENTION_ENTRIES", 2 * 3 * 64**2 + 1)  # of 2 images
    for method in ("occlusion", "shapley"):
        settings = MapSettings(method=method)  # type: ignore[arg-type]
        shares_in_tiles(reader, mosaics_MCHW[:1], classes_M4[:1], settings)
        assert max(seen) == 2
    # A model that reads one class in each quarter of the picture.

    class Quarters(VisionTransformer):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            means = images_BCHW.mean(1).unflatten(1, (2, 16)).unflatten(3, (2, 16)).mean((2, 4))
            return torch.cat([means.flatten(1), means[:, :1, 0]], dim=1)

    reader = Quarters(dataclasses.replace(model.config, image_size=32)).eval()
    classes_M4 = torch.arange(4).expand(10, 4)
    # Of a probability, the patches of the other classes have a share, too.
    for method, least in (("occlusion", 0.4), ("shapley", 0.4), ("integrated_gradients", 0.99)):
        settings = MapSettings(method=method)  # type: ignore[arg-type]
        if method == "occlusion":
            settings = dataclasses.replace(settings, window=1)
        shares_M4 = shares_in_tiles(reader, mosaics_MCHW, classes_M4, settings)
        assert shares_M4.mean() > least, method


class Corner(VisionTransformer):
    """Reads the color of the corner, and nothing else."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        colors_BC = images_BCHW[:, :, :4, :4].mean((2, 3))
        return -torch.cdist(colors_BC, COLORS.float() / 255).square()


def test_a_model_of_the_mark_is_found_out_and_its_maps_point_at_the_mark() -> None:
    config = ModelConfig(
        image_size=16, patch_size=4, embed_dim=24, n_layers=1, n_attention_heads=3, n_classes=10,
        pool="mean", head="linear",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    raw_BCHW = torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images = ImageSet(raw_BCHW, torch.arange(40) % 10, tuple("abcdefghij"))
    reader, methods = Corner(config).eval(), ("attention", "integrated_gradients", "occlusion")
    found = check_shortcut(reader, images, lambda raw: raw / 255, methods)  # type: ignore[arg-type]
    assert found.accuracies["own"] == 1
    assert found.accuracies["none"] < 0.4
    assert found.accuracies["another"] == 0
    assert found.decided == 40
    assert found.even == 1 / 16
    assert list(found.shares) == list(methods)
    assert found.shares["integrated_gradients"].mean == pytest.approx(1)
    assert found.shares["occlusion"].mean > 0.3  # a window of two patches: at most a quarter each
    assert found.shares["attention"].mean < 0.2
    plain = VisionTransformer(config).eval()
    untaught = check_shortcut(plain, images, lambda raw: raw / 255, methods)  # type: ignore[arg-type]
    assert untaught.decided < 20
    json.dumps([found.to_json(), untaught.to_json()])


def test_several_classes_take_the_same_passes_as_one(model: VisionTransformer) -> None:
    images_BCHW = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    classes_BK = torch.tensor([[0, 3], [2, 1], [4, 4]])

    def score(logits_XY: Tensor, image_X: Tensor) -> Tensor:
        return logits_XY.gather(1, classes_BK[image_X])

    for settings in (
        MapSettings(method="occlusion", chunk=7),
        MapSettings(method="shapley", passes=40, chunk=7),
    ):
        with torch.no_grad():
            both_BKGJ = removal.compute(model, images_BCHW, score, settings)[0]
        for k, classes_B in enumerate(classes_BK.T):
            alone = compute_maps(model, images_BCHW, settings, classes_B=classes_B)
            torch.testing.assert_close(both_BKGJ[:, k], alone.values_BLGJ[:, 0])
