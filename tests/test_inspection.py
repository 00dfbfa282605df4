"""Inspecting a model, on cases worked by hand: filters, positions, distances, entropies."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vitrail.config.settings import ModelConfig
from vitrail.errors import DataError, OutputError
from vitrail.explain import inspection
from vitrail.explain.inspection import (
    draw_inspection,
    head_statistics,
    inspect_model,
    patch_distances,
    patch_filters,
    position_similarity,
)
from vitrail.model.vit import VisionTransformer
from vitrail.weights.pretrained import load


def build(config: ModelConfig) -> VisionTransformer:
    torch.manual_seed(2)
    return VisionTransformer(config).eval()


def pictures(config: ModelConfig, count: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, config.n_channels, *config.image_hw, generator=generator)


class Staring:
    """A mock model with the given attention, as far as head_statistics() reads it."""

    def __init__(self, config: ModelConfig, attentions: list[Tensor]) -> None:
        self.config, self.attentions = config, attentions

    def forward_with_attention(self, images_BCHW: Tensor) -> tuple[None, tuple[Tensor, ...]]:
        B = len(images_BCHW)
        return None, tuple(a_ATT.expand(B, -1, -1, -1) for a_ATT in self.attentions)


# Filters


def test_filters_of_the_patch_stem_are_its_weights(tiny_model: ModelConfig) -> None:
    """All filters lie along two patterns, so these are the components, the stronger first."""
    model = build(tiny_model)
    patterns_2CHW = torch.zeros(2, 3, 4, 4)
    patterns_2CHW[0, 0, 0, 0], patterns_2CHW[1, 2, 3, 3] = 1, 1
    amounts_D2 = torch.zeros(24, 2)
    amounts_D2[:4] = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    with torch.no_grad():
        model.stem.weight.copy_((amounts_D2 @ patterns_2CHW.flatten(1)).view(24, 3, 4, 4))
    tiles_KHWC, shares_K = patch_filters(model)
    assert tiles_KHWC.shape == (24, 4, 4, 3)
    torch.testing.assert_close(tiles_KHWC[:2], 0.5 + 0.5 * patterns_2CHW.permute(0, 2, 3, 1))
    assert shares_K[:3].tolist() == pytest.approx([0.9, 0.1, 0], abs=1e-6)


def test_filters_of_one_3x3_convolution_are_its_weights_too() -> None:
    config = ModelConfig(
        image_size=(12, 20), n_classes=2, patch_size=2, embed_dim=12, stem="conv",
        stem_channels=(40,),
    )  # fmt: skip
    model = build(config)  # its norm changes nothing yet, its GELU halves around zero
    tiles_KHWC, shares_K = patch_filters(model)
    white, convolution, last = (model.stem[index].weight.detach().double() for index in (0, 2, -1))
    both_DE33 = torch.einsum("dm,meij->deij", last[:, :, 0, 0], convolution)
    pooled_DE44 = F.conv_transpose2d(
        both_DE33.flatten(0, 1)[:, None], torch.ones(1, 1, 2, 2).double()
    )
    pooled_DE44 = pooled_DE44.view(12, -1, 4, 4)
    weight_DX = F.conv_transpose2d(pooled_DE44, white).flatten(1)
    variances_X = torch.linalg.eigvalsh(torch.cov(weight_DX.T)).flip(0)
    assert tiles_KHWC.shape[1:] == (6, 6, 3)
    torch.testing.assert_close(shares_K, (variances_X / variances_X.sum())[: len(shares_K)].float())


def test_filters_of_several_convolutions_reach_over_the_patch(tiny_model: ModelConfig) -> None:
    tiles_KHWC, shares_K = patch_filters(build(replace(tiny_model, stem="conv")), components=5)
    assert tiles_KHWC.shape == (5, 18, 18, 3)
    assert shares_K.tolist() == sorted(shares_K.tolist(), reverse=True)
    assert tiles_KHWC.amax((1, 2, 3)).tolist() == [1] * 5
    assert tiles_KHWC.min() >= 0


def test_reading_filters_leaves_no_gradient(tiny_model: ModelConfig) -> None:
    model = build(tiny_model)
    assert not patch_filters(model).tiles_KHWC.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


# Positions


@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_similarity_of_a_table_is_its_cosine(tiny_model: ModelConfig, position: str) -> None:
    model = build(replace(tiny_model, position=position))
    similarity = position_similarity(model)
    assert similarity.shape == (5, 7, 5, 7)
    table_ND = model.position_ND.detach()
    expected = F.cosine_similarity(table_ND[1 * 7 + 2], table_ND[4 * 7 + 6], dim=0)
    assert similarity[1, 2, 4, 6].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_similarity_of_rotary_positions_by_hand(tiny_model: ModelConfig, pool: str) -> None:
    """Head width 8: two frequencies, 1 and a tenth, turn with rows and two with columns."""
    similarity = position_similarity(build(replace(tiny_model, position="rope", pool=pool)))
    rows, columns = 3, -4
    angles = [rows, rows / 10, columns, columns / 10]
    expected = sum(map(math.cos, angles)) / 4
    assert similarity[1, 6, 4, 2].item() == pytest.approx(expected, abs=1e-5)
    assert similarity[2, 3, 2, 3].item() == pytest.approx(1)


# Heads


def test_distances_between_patches_in_pixels(tiny_model: ModelConfig) -> None:
    between_NN = patch_distances(build(tiny_model))
    assert between_NN.shape == (35, 35)
    assert between_NN[0, 3 * 7 + 4].item() == pytest.approx(4 * 5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_head_that_looks_at_the_next_patch(pool: str) -> None:
    """Two patches of 4 pixels side by side; heads attend to themselves, to the other, to both."""
    config = ModelConfig(image_size=(4, 8), n_classes=2, patch_size=4, pool=pool)
    stay, cross = torch.eye(2), torch.eye(2).flip(0)
    attention_ATT = torch.stack([stay, cross, (stay + cross) / 2])
    if pool == "cls":
        # A quarter of each row goes to the class token, which has no place.
        attention_ATT = F.pad(attention_ATT * 0.75, (1, 0, 1, 0), value=0.25)
        attention_ATT[:, 0] = 1 / 3
    model = Staring(config, [attention_ATT, attention_ATT.flip(0)])
    found = head_statistics(model, torch.zeros(3, 3, 4, 8), chunk=2)
    assert found.distance_BLA.shape == (3, 2, 3)
    assert found.distance_BLA[2, 0].tolist() == pytest.approx([0, 4, 2])
    assert found.distance_BLA[2, 1].tolist() == pytest.approx([2, 4, 0])
    if pool == "mean":
        expected = [0, 0, math.log(2)]
    else:
        quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
        spread = -(0.25 * math.log(0.25) + 0.75 * math.log(0.375))
        expected = [(math.log(3) + 2 * row) / 3 for row in (quarter, quarter, spread)]
    assert found.entropy_BLA[0, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_uniform_attention(tiny_model: ModelConfig) -> None:
    model = build(tiny_model)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.qkv.weight)
    images_BCHW = pictures(tiny_model)
    inspected = inspect_model(model, images_BCHW)
    heads = inspected.heads
    assert heads is not None
    numbers = inspected.to_json()
    assert numbers["images"] == len(heads.distance_BLA) == len(images_BCHW)
    entropies, distances = (
        np.array(numbers[f"attention_{name}"]) for name in ("entropy_nats", "distance_pixels")
    )
    assert np.abs(entropies - math.log(36)).max() < 1e-4
    assert np.abs(distances - numbers["attention_distance_if_uniform"]).max() < 1e-4
    assert np.abs(numbers["attention_distance_half_interval"]).max() < 1e-4


def test_an_image_does_not_depend_on_its_batch(tiny_model: ModelConfig) -> None:
    model, images_BCHW = build(tiny_model), pictures(tiny_model)
    batch = head_statistics(model, images_BCHW, chunk=4)
    alone = head_statistics(model, images_BCHW[5, None])
    torch.testing.assert_close(batch.distance_BLA[5], alone.distance_BLA[0])
    torch.testing.assert_close(batch.entropy_BLA[5], alone.entropy_BLA[0])


def test_entropy_of_the_reference_systems_attention(reference: Path) -> None:
    expected = np.load(reference / "layer3-dim32_expected.npz")
    model = load(reference / "layer3-dim32.pt", device="cpu").model
    entropy_LA = head_statistics(model, torch.from_numpy(expected["images"])).entropy_BLA.mean(0)
    attention = expected["attention"].astype(np.float64)  # layers, images, heads, tokens, tokens
    expected_LA = -(attention * np.log(attention)).sum(-1).mean((1, 3))
    np.testing.assert_allclose(entropy_LA.numpy(), expected_LA, atol=1e-4)


# The complete report


CONFIGS = {
    "class token, learned": {},
    "gray, rotary, mean": {"n_channels": 1, "position": "rope", "pool": "mean"},
    "convolutions, sines, many heads": {
        "stem": "conv", "position": "sincos", "n_attention_heads": 12, "n_layers": 1,
    },
    "one patch": {"image_size": 4},
    "a large grid": {"image_size": (20, 60), "n_layers": 13},
}  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_an_inspection_is_drawn_and_has_numbers(
    tmp_path: Path, tiny_model: ModelConfig, changes: dict[str, object]
) -> None:
    config = replace(tiny_model, **changes)
    inspected = inspect_model(build(config), pictures(config), chunk=4)
    draw_inspection(inspected, tmp_path / "inspection.png")
    with Image.open(tmp_path / "inspection.png") as picture:
        assert min(picture.size) > 900
    numbers = inspected.to_json()
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    layers, heads = config.n_layers, config.n_attention_heads
    for name in ("attention_distance_pixels", "attention_entropy_nats"):
        assert np.shape(numbers[name]) == (layers, heads)
    assert np.shape(numbers["similarity_to_middle_patch"]) == config.grid_GJ


def test_without_images_filters_and_positions_are_still_drawn(
    tmp_path: Path, tiny_model: ModelConfig
) -> None:
    model = build(tiny_model)
    without, with_images = inspect_model(model, None), inspect_model(model, pictures(tiny_model))
    draw_inspection(without, tmp_path / "inspection.png")
    with Image.open(tmp_path / "inspection.png") as picture:
        assert picture.width > 900
    numbers, more = without.to_json(), with_images.to_json()
    assert {name: more[name] for name in numbers} == numbers
    missing = set(more) - set(numbers)
    assert missing == {"images", *(name for name in more if "half_interval" in name),
                       "attention_distance_pixels", "attention_entropy_nats"}  # fmt: skip


def test_large_grids_show_some_patches_evenly() -> None:
    assert inspection._spread(5) == [0, 1, 2, 3, 4]
    shown = inspection._spread(40)
    assert (len(shown), shown[0], shown[-1]) == (14, 0, 39)
    assert inspection._spread(1) == [0]


def test_what_cannot_be_inspected_or_written_is_refused(
    tmp_path: Path, tiny_model: ModelConfig
) -> None:
    model = build(tiny_model)
    with pytest.raises(DataError, match="no images to measure"):
        head_statistics(model, pictures(tiny_model, 0))
    with pytest.raises(DataError, match="9 images are too few"):
        inspect_model(model, pictures(tiny_model, 9))
    inspected = inspect_model(model, pictures(tiny_model))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        draw_inspection(inspected, tmp_path / "file" / "inspection.png")


@pytest.mark.slow
def test_pyplot_is_never_loaded() -> None:
    code = (
        "import sys, vitrail.explain.inspection, vitrail.explain.map_report; "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
