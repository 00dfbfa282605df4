"""The Vision Transformer: shapes, the two forwards, initialization, what is refused."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.config.settings import ModelConfig
from vitrail.errors import ConfigError
from vitrail.model.layers import (
    Dropout,
    DropPath,
    PatchStem,
    WhitePatches,
    rotate,
    rotation_tables,
    sincos_table,
)
from vitrail.model.vit import Block, VisionTransformer, initialize

CHOICES = {
    "pool": ("cls", "mean"),
    "stem": ("patch", "conv"),
    "position": ("learned", "sincos", "rope"),
    "head": ("mlp", "linear"),
}


@pytest.mark.parametrize("choice", list(itertools.product(*CHOICES.values())), ids="-".join)
def test_both_forwards_agree_and_attention_is_a_distribution(
    tiny_model: ModelConfig, choice: tuple[str, ...]
) -> None:
    config = dataclasses.replace(tiny_model, **dict(zip(CHOICES, choice, strict=True)))
    torch.manual_seed(0)
    model = VisionTransformer(config).eval()
    images_BCHW = torch.randn(5, 3, 20, 28)
    logits_BY, attentions = model.forward_with_attention(images_BCHW)
    n_tokens = 5 * 7 + (config.pool == "cls")
    assert logits_BY.shape == (5, 7)
    assert [a.shape for a in attentions] == [(5, 3, n_tokens, n_tokens)] * 2
    torch.testing.assert_close(logits_BY, model(images_BCHW))
    for attention_BATT in attentions:
        torch.testing.assert_close(attention_BATT.sum(-1), torch.ones(5, 3, n_tokens))
    torch.testing.assert_close(model(images_BCHW[2:3]), logits_BY[2:3], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("position", CHOICES["position"])
@pytest.mark.parametrize("stem", CHOICES["stem"])
def test_under_autocast_tokens_stay_bfloat16(
    tiny_model: ModelConfig, stem: str, position: str
) -> None:
    config = dataclasses.replace(tiny_model, stem=stem, position=position)
    torch.manual_seed(0)
    model = VisionTransformer(config).eval()
    read: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].dtype))
    images_BCHW = torch.randn(5, 3, 20, 28)
    expected_BY = model(images_BCHW)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BY = model(images_BCHW)
    assert read == [torch.float32] * 2 + [torch.bfloat16] * 2
    torch.testing.assert_close(logits_BY.float(), expected_BY, atol=2e-2, rtol=0)


def test_blocks_run_one_at_a_time_and_keep_only_the_attention_asked_for(
    tiny_model: ModelConfig,
) -> None:
    model = VisionTransformer(dataclasses.replace(tiny_model, n_layers=3)).eval()
    images_BCHW = torch.randn(2, 3, 20, 28)
    ran: list[int] = []
    for layer, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    blocks = model.run_blocks(model.embed(images_BCHW), keep_attention=(2,))
    for layer, tokens_BTD, attention_BATT in blocks:
        logits_BY = model.classify(tokens_BTD)
        assert ran == list(range(1, layer + 1))
        assert (attention_BATT is not None) == (layer == 2)
    assert torch.equal(logits_BY, model.forward_with_attention(images_BCHW)[0])
    torch.testing.assert_close(logits_BY, model(images_BCHW), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kept", [(), (2,), (3,)])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize(("pool", "read"), [("cls", 1), ("cls_register", 2), ("mean", None)])
def test_the_last_block_computes_only_what_the_head_reads(
    tiny_model: ModelConfig, pool: str, read: int | None, position: str, kept: tuple[int, ...]
) -> None:
    config = dataclasses.replace(
        tiny_model, n_layers=3, n_registers=2, class_token=True, pool=pool, position=position
    )
    model = VisionTransformer(config).eval()
    returned: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, tokens: returned.append(tokens.shape[1]))
    images_BCHW = torch.randn(2, 3, 20, 28)
    features_BD, attentions = model.features_with_attention(images_BCHW, kept)
    T = 3 + 5 * 7
    last = T if read is None or kept == (3,) else read
    assert returned == [T, T, last]
    assert [tuple(a.shape[2:]) for a in attentions] == [(T, T)] * len(kept)
    *_, (_, tokens_BTD, _) = model.run_blocks(model.embed(images_BCHW))
    assert tokens_BTD.shape[1] == T
    torch.testing.assert_close(features_BD, model.summarize(tokens_BTD), rtol=1e-5, atol=1e-5)


def test_the_model_compiles_to_one_graph(tiny_model: ModelConfig) -> None:
    model = VisionTransformer(tiny_model).eval()
    images_BCHW = torch.randn(2, 3, 20, 28)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images_BCHW), model(images_BCHW))


def test_gradients_reach_the_attention_that_was_used(tiny_model: ModelConfig) -> None:
    model = VisionTransformer(tiny_model).eval()
    logits_BY, attentions = model.forward_with_attention(torch.randn(2, 3, 20, 28))
    for gradient in torch.autograd.grad(logits_BY[:, 3].sum(), attentions):
        assert gradient.abs().sum() > 0


def test_a_model_depends_on_the_position_of_a_patch(tiny_model: ModelConfig) -> None:
    images_BCHW = torch.randn(1, 3, 20, 28)
    turned_BCHW = images_BCHW.roll(4, dims=3)
    for position in ("learned", "sincos", "rope", "rope_centered"):
        torch.manual_seed(1)
        model = VisionTransformer(dataclasses.replace(tiny_model, position=position)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8)  # far from the linear regime of a fresh model
        assert not torch.allclose(model(images_BCHW), model(turned_BCHW), atol=1e-4), position


@pytest.mark.parametrize("centered", [False, True])
def test_rotary_products_depend_on_differences_only(centered: bool) -> None:
    rotation = rotation_tables((5, 7), 8, n_prefix_tokens=0, centered=centered)
    q_K, k_K = torch.randn(8), torch.randn(8)
    q_NK, k_NK = rotate(q_K.expand(35, 8), rotation), rotate(k_K.expand(35, 8), rotation)
    products_NN = q_NK @ k_NK.T
    at = {(g, j): g * 7 + j for g in range(5) for j in range(7)}
    first = products_NN[at[1, 2], at[3, 5]]
    torch.testing.assert_close(products_NN[at[0, 0], at[2, 3]], first)
    assert not torch.allclose(products_NN[at[0, 0], at[3, 2]], first)


def test_sincos_positions_are_all_different() -> None:
    table_ND = sincos_table((5, 7), 24)
    distances_NN = torch.cdist(table_ND, table_ND)
    assert distances_NN.fill_diagonal_(1.0).min() > 0.1


def test_initialization_is_the_references(tiny_model: ModelConfig) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(dataclasses.replace(tiny_model, embed_dim=96))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif "norm" in name:
            assert parameter.eq(1).all(), name
        elif parameter.numel() > 500:
            assert 0.015 < parameter.std() < 0.022, name
            assert parameter.abs().max() < 6 * 0.02, name


def test_weights_are_normal_with_the_tails_of_a_normal_distribution() -> None:
    for layer, std in ((nn.Linear(200, 250), 0.03), (PatchStem(3, 1000, 4), 0.02)):
        torch.manual_seed(1)
        initialize(layer, std=0.03)
        weights = layer.weight.flatten() / std
        assert len(weights) > 45_000
        # Shares of a normal distribution: 0.3173 beyond one deviation, 0.0455 beyond two.
        for deviations, share in ((1, 0.3173), (2, 0.0455)):
            beyond = (weights.abs() > deviations).float().mean().item()
            spread = (share * (1 - share) / len(weights)) ** 0.5
            assert beyond == pytest.approx(share, abs=4 * spread)


def test_kernels_of_the_stem_pass_their_input_on_and_keep_its_size() -> None:
    torch.manual_seed(0)
    config = ModelConfig(stem="conv", patch_size=8, stem_channels=(48, 96, 64), n_classes=3)
    stem = VisionTransformer(config).stem
    kernels = [m.weight for m in stem.modules() if isinstance(m, nn.Conv2d) and m is not stem[0]]  # type: ignore[index]
    assert len(kernels) == 4
    for kernel in kernels:
        inputs, side = kernel.shape[1], kernel.shape[2]
        if side == 3:
            images_BCHW = torch.randn(2, inputs, 5, 7)
            passed = min(inputs, len(kernel))
            same_BCHW = nn.functional.conv2d(images_BCHW, kernel, padding=1)[:, :passed]
            torch.testing.assert_close(same_BCHW, images_BCHW[:, :passed])
            kernel = kernel[inputs:]
        if len(kernel):
            # He: variance 2 / fan_in
            assert kernel.std().item() == pytest.approx((2 / kernel[0].numel()) ** 0.5, rel=0.03)


def test_stochastic_depth_rises_from_the_first_block_to_the_last(tiny_model: ModelConfig) -> None:
    for n_layers, expected in ((4, [0, 0.1, 0.2, 0.3]), (2, [0, 0.3]), (1, [0])):
        config = dataclasses.replace(tiny_model, n_layers=n_layers, drop_path=0.3)
        paths = [block.drop_path for block in VisionTransformer(config).blocks]
        assert [path.probability for path in paths] == pytest.approx(expected)


def test_blocks_have_different_initial_weights(tiny_model: ModelConfig) -> None:
    first, second = VisionTransformer(tiny_model).blocks
    assert not torch.equal(first.mlp.fc1.weight, second.mlp.fc1.weight)


def test_a_block_with_zero_branches_is_the_identity() -> None:
    block = Block(ModelConfig(embed_dim=24, n_attention_heads=3, dropout=0.0))
    for layer in (block.attention.out_projection, block.mlp.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    tokens_BTD = torch.randn(2, 5, 24)
    assert torch.equal(block(tokens_BTD)[0], tokens_BTD)


def test_dropout_zeroes_the_given_fraction_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropout, ones = Dropout(0.3), torch.ones(101, 997)
    dropped = dropout(ones)
    assert dropped.eq(0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(dropout.eval()(ones), ones)


def test_drop_path_drops_all_values_of_an_image() -> None:
    torch.manual_seed(0)
    path = DropPath(0.4)
    kept_B = path(torch.ones(997, 3, 5)).flatten(1)
    torch.testing.assert_close(kept_B.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert kept_B.std(dim=1).max() == 0
    assert kept_B.mean() == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 30}, ["image_size 30", "patch_size 4", "give image_size 32"]),
        ({"embed_dim": 25}, ["embed_dim 25", "n_attention_heads 3", "give embed_dim 24"]),
        ({"position": "rope", "embed_dim": 18}, ["rope", "head width", "give embed_dim 24"]),
        ({"position": "sincos", "embed_dim": 27}, ["sincos", "27"]),
        ({"stem": "conv", "patch_size": 5, "image_size": 20}, ["conv", "patch_size 5"]),
        (
            {"stem": "conv", "patch_size": 8, "image_size": 24, "stem_channels": (7,)},
            ["(7,)", "3 widths"],
        ),
        ({"stem": "conv", "stem_channels": (7, 0)}, ["stem_channels (7, 0)"]),
        (
            {"stem": "conv", "stem_pools": (1, 1)},
            ["stem_pools (1, 1)", "give 2 different numbers from 1 to 3"],
        ),
        ({"stem": "conv", "stem_pools": (1, 4)}, ["stem_pools (1, 4)"]),
        ({"stem_channels": (5, 7)}, ["stem_channels", "--stem conv"]),
        ({"stem_pools": (1, 2)}, ["stem_pools", "--stem conv"]),
        ({"dropout": 1.0}, ["dropout is 1.0"]),
        ({"n_layers": 0}, ["n_layers is 0"]),
        ({"n_channels": 2}, ["n_channels is 2"]),
        ({"forward_mul": 0.01}, ["forward_mul"]),
    ],
)
def test_invalid_models_are_refused_with_a_remedy(
    tiny_model: ModelConfig, changes: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        dataclasses.replace(tiny_model, **changes)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("patch_size", "channels", "pools", "heights"),
    [
        (2, (), (), [16, 16, 8]),
        (2, (5, 7), (2,), [16, 16, 16]),
        (4, (), (), [16, 16, 8, 4]),
        (4, (5, 7, 9, 11), (1, 3), [16, 16, 8, 8, 4]),
        (8, (5, 7, 9, 11), (), [16, 16, 8, 4, 2]),
    ],
)
def test_the_stem_halves_the_image_after_the_convolutions_asked_for(
    patch_size: int, channels: tuple[int, ...], pools: tuple[int, ...], heights: list[int]
) -> None:
    config = ModelConfig(
        image_size=(16, 24), patch_size=patch_size, embed_dim=12, n_classes=3, stem="conv",
        stem_channels=channels, stem_pools=pools,
    )  # fmt: skip
    stem = VisionTransformer(config).stem
    convolutions = [m for m in stem.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3]
    seen: list[int] = []
    for convolution in convolutions:
        convolution.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[2]))
    assert stem(torch.randn(2, 3, 16, 24)).shape == (2, 12, 16 // patch_size, 24 // patch_size)
    assert seen == heights[: len(convolutions)]
    widths = channels or {2: (6, 12), 4: (3, 6, 12)}[patch_size]
    assert [c.out_channels for c in convolutions] == [32, *widths]


@pytest.mark.parametrize("n_channels", [1, 3])
def test_white_patches_have_unit_covariance(n_channels: int) -> None:
    images_BCHW = torch.randn(300, n_channels, 12, 12).cumsum(2).cumsum(3)  # correlated neighbors
    patches = WhitePatches(n_channels)
    patches.whiten(images_BCHW)
    assert not patches.weight.requires_grad
    responses_BEGJ = patches(images_BCHW)[:, :, 1:-1, 1:-1]  # without the border
    n = {1: 8, 3: 16}[n_channels]
    torch.testing.assert_close(responses_BEGJ[:, :n], -responses_BEGJ[:, n:])
    responses_RE = responses_BEGJ[:, :n].transpose(0, 1).flatten(1).T
    covariance_EE = responses_RE.T @ responses_RE / len(responses_RE)
    torch.testing.assert_close(covariance_EE, torch.eye(n), atol=0.15, rtol=0)
    # They are the strongest components: no others explain as much of the patches.
    patches_RE = F.unfold(images_BCHW, 3).transpose(1, 2).flatten(0, 1)
    moments_EE = patches_RE.T @ patches_RE / len(patches_RE)
    basis_EN = torch.linalg.qr(patches.weight[:n].flatten(1).T).Q
    explained = (basis_EN.T @ moments_EE @ basis_EN).trace()
    torch.testing.assert_close(explained, torch.linalg.eigvalsh(moments_EE)[-n:].sum())


def test_a_model_without_classes_returns_what_a_head_would_read(tiny_model: ModelConfig) -> None:
    config = dataclasses.replace(tiny_model, n_classes=0, pool="cls_mean", n_registers=3)
    model = VisionTransformer(config).eval()
    tokens_BTD = model.embed(torch.randn(2, config.n_channels, *config.image_hw))
    assert tokens_BTD.shape[1] == 4 + config.grid_GJ[0] * config.grid_GJ[1]
    normed_BTD = model.norm(tokens_BTD)
    read_BX = torch.cat([normed_BTD[:, 0], normed_BTD[:, 4:].mean(1)], dim=1)
    torch.testing.assert_close(model.classify(tokens_BTD), read_BX)
    assert not [name for name in model.state_dict() if name.startswith("head.")]


@pytest.mark.parametrize(("n_layers", "parameters"), [(6, 827_530), (12, 1_622_410)])
def test_parameter_counts_are_the_references(n_layers: int, parameters: int) -> None:
    model = VisionTransformer(ModelConfig(n_classes=10, n_layers=n_layers))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_hidden_width_is_rounded_not_cut_off() -> None:
    """100 * 1.15 is 114.99999999999999 in floating point."""
    config = ModelConfig(embed_dim=100, n_attention_heads=4, forward_mul=1.15)
    assert config.hidden_dim == 115


@pytest.mark.parametrize("branch", ["attention.out_projection", "mlp.fc2"])
@pytest.mark.parametrize("kind", ["dropout", "drop_path"])
def test_dropout_and_stochastic_depth_apply_to_each_branch(branch: str, kind: str) -> None:
    rate = {"dropout": 0.5} if kind == "dropout" else {"dropout": 0.0}
    block = Block(
        ModelConfig(embed_dim=24, n_attention_heads=3, **rate),
        drop_path=0.5 * (kind == "drop_path"),
    )
    for name, parameter in block.named_parameters():
        torch.nn.init.zeros_(parameter)
        if name == f"{branch}.bias":  # this branch alone adds 1 to everything
            torch.nn.init.ones_(parameter)
    torch.manual_seed(1)
    added_BTD = block(torch.zeros(64, 5, 24))[0]
    assert added_BTD.unique().tolist() == [0, 2]
    by_image = added_BTD.flatten(1).std(1).max().item() == 0
    assert by_image == (kind == "drop_path")


def test_linear_layers_begin_with_the_deviation_that_is_set(tiny_model: ModelConfig) -> None:
    model = VisionTransformer(dataclasses.replace(tiny_model, init_std=0.3))
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.3, rel=0.1)
