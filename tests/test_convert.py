"""Weights of other systems: parity, inferred settings, errors, and conversion back."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import vitrail
from layouts import GRID, SIDE, D, L, N, make_state, plain_logits
from vitrail.cli import main
from vitrail.config.settings import Config, DataConfig, ModelConfig
from vitrail.errors import CheckpointError, ConfigError
from vitrail.evaluation.calibration import Calibration
from vitrail.model.finetune import resize_positions
from vitrail.model.vit import VisionTransformer
from vitrail.weights.checkpoint import CheckpointInfo, save_weights_file
from vitrail.weights.formats import timm
from vitrail.weights.formats.convert import convert, convert_back, read_state

LAYOUTS = ("reference", "timm", "huggingface", "google")


def ours(state: dict[str, Tensor], files: dict[str, Any] | None = None) -> VisionTransformer:
    """The Vitrail model of a state dict."""
    found = convert(state, files, n_attention_heads=3)
    model = VisionTransformer(found.config).eval()
    model.load_state_dict(found.weights)
    return model


def noise(side: int = SIDE) -> Tensor:
    """Five pictures of noise."""
    return torch.randn(5, 3, side, side, generator=torch.Generator().manual_seed(1))


def difference(a_BY: Tensor, b_BY: Tensor) -> float:
    """The largest difference of logits that are not all equal."""
    assert b_BY.std() > 0.1
    return (a_BY - b_BY).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_the_layout_read_by_hand(layout: str) -> None:
    state = make_state(layout)
    model, plain = ours(state), plain_logits(layout, state)
    largest = difference(model(noise()), plain(noise()))
    print(f"\n{layout} in: max |difference| {largest:.1e}")
    assert largest < 1e-5
    written = convert_back(model.config, model.state_dict(), layout)
    largest = difference(model(noise()), plain_logits(layout, written)(noise()))
    print(f"{layout} out: max |difference| {largest:.1e}")
    assert largest < 1e-5
    assert {key: t.shape for key, t in written.items()} == {
        key: t.shape for key, t in state.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_settings_are_inferred_from_the_shapes(layout: str) -> None:
    found = convert(make_state(layout), n_attention_heads=3)
    config = found.config
    assert found.layout == layout
    assert (config.image_size, config.patch_size, config.n_classes) == (15, 5, 7)
    assert (config.embed_dim, config.hidden_dim, config.n_layers) == (24, 42, 2)
    assert config.n_attention_heads == 3
    assert config.head == ("mlp" if layout in ("reference", "google") else "linear")


@torch.no_grad()
def test_optional_keys_of_other_files_change_no_logit() -> None:
    google, hf = make_state("google"), make_state("huggingface")
    for key in [key for key in google if key.startswith("pre_logits")]:
        del google[key]
    assert difference(ours(google)(noise()), plain_logits("google", google)(noise())) < 1e-5
    beside = {f"opt/target/{k}": t for k, t in google.items()} | {"opt/state/step": torch.ones(1)}
    assert difference(ours(beside)(noise()), plain_logits("google", google)(noise())) < 1e-5

    extra = {"vit.pooler.dense.weight": torch.ones(D, D), "vit.pooler.dense.bias": torch.ones(D)}
    found = convert(hf | extra, n_attention_heads=3)
    assert any("pooler" in note and "ignored" in note for note in found.notes)

    timm = make_state("timm")
    plain = plain_logits("timm", timm)(noise())
    timm |= {f"blocks.{i}.ls{branch}.gamma": torch.ones(D) for i in range(L) for branch in (1, 2)}
    timm["blocks.1.ls1.gamma"] = gamma_D = torch.linspace(0.5, 2, D)
    timm["blocks.1.attn.proj.weight"] = timm["blocks.1.attn.proj.weight"] / gamma_D[:, None]
    timm["blocks.1.attn.proj.bias"] = timm["blocks.1.attn.proj.bias"] / gamma_D
    assert difference(ours(timm)(noise()), plain) < 1e-5


def timm_by_hand(state: dict[str, Tensor], images: Tensor, *, placed: int) -> Tensor:
    """Logits of timm's variants, written from its code: ``placed`` tokens have a position, too."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    patches = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).mT
    before = [state[name] for name in ("cls_token", "dist_token", "reg_token") if name in state]
    first = torch.cat([token.expand(len(images), -1, -1) for token in before], dim=1)
    places = state["pos_embed"]
    x = torch.cat([first, patches + places[:, placed:]], dim=1)
    x[:, :placed] += places[:, :placed]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    for at in (f"blocks.{index}." for index in range(L)):
        qkv = linear(norm(x, at + "norm1"), at + "attn.qkv").unflatten(2, (3, 3, D // 3))
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        mixed = linear(mixed.transpose(1, 2).flatten(2), at + "attn.proj")
        x = x + state.get(at + "ls1.gamma", 1) * mixed
        hidden = linear(norm(x, at + "norm2"), at + "mlp.fc1")
        gate, value = hidden.chunk(2, dim=-1)
        wide = hidden.shape[-1] == state[at + "mlp.fc2.weight"].shape[1]
        hidden = F.gelu(hidden) if wide else F.silu(gate) * value
        x = x + state.get(at + "ls2.gamma", 1) * linear(hidden, at + "mlp.fc2")
    x = norm(x, "norm")
    if "head_dist.weight" not in state:
        return linear(x[:, 0], "head")
    return (linear(x[:, 0], "head") + linear(x[:, 1], "head_dist")) / 2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["DeiT III", "registers with positions", "giant", "distilled"])
def test_timms_variants_are_read_as_written_by_hand(variant: str) -> None:
    state, noisy = make_state("timm"), torch.Generator().manual_seed(8)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noisy) * 0.3

    rows = {"DeiT III": 0, "registers with positions": 4, "giant": 1, "distilled": 2}[variant]
    state["pos_embed"] = draw(1, N + rows, D)
    if variant == "distilled":
        state |= {"dist_token": draw(1, 1, D), "head_dist.weight": draw(7, D)}
        state["head_dist.bias"] = draw(7)
    else:
        state |= {f"blocks.{i}.ls{n}.gamma": draw(D) for i in range(L) for n in (1, 2)}
        state["reg_token"] = draw(1, 3, D)
    expected_of = dict(state)
    if variant == "giant":
        for index in range(L):
            wide, gate = f"blocks.{index}.mlp.fc1", draw(84, D)
            state |= {f"{wide}.weight": gate, f"{wide}.bias": draw(84)}
        expected_of = dict(state)
        state["mask_token"] = draw(1, D)
        state = {  # the names of DINOv2's own code
            key.replace("reg_token", "register_tokens")
            .replace("fc1", "w12")
            .replace("fc2", "w3"): t
            for key, t in state.items()
        }
    expected_BY = timm_by_hand(expected_of, noise(), placed=rows)
    largest = difference(ours(state)(noise()), expected_BY)
    print(f"\ntimm in, {variant}: max |difference| {largest:.1e}")
    assert largest < 1e-5


@torch.no_grad()
def test_missing_biases_are_zeros() -> None:
    state = make_state("timm")
    zeros = state | {key: t * 0 for key, t in state.items() if key.endswith("qkv.bias")}
    without = {key: t for key, t in state.items() if not key.endswith("qkv.bias")}
    assert difference(ours(without)(noise()), plain_logits("timm", zeros)(noise())) < 1e-5
    notes = convert(without, n_attention_heads=3).notes
    assert any("blocks.0.attn.qkv.bias, blocks.1" in note for note in notes)


@torch.no_grad()
def test_timms_mean_leaves_the_class_token_out_and_is_normed_after() -> None:
    state = make_state("timm")
    model = ours({key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: t
                  for key, t in state.items()})  # fmt: skip
    assert (model.config.pool, model.config.class_token, model.config.fc_norm) == (
        "mean",
        True,
        True,
    )
    tokens_BTD = model.embed(noise())
    for block in model.blocks:
        tokens_BTD, _ = block(tokens_BTD)
    mean_BD = tokens_BTD[:, 1:].mean(dim=1)
    normed_BD = torch.nn.functional.layer_norm(
        mean_BD, (D,), state["norm.weight"], state["norm.bias"], 1e-6
    )
    expected_BY = normed_BD @ state["head.weight"].T + state["head.bias"]
    assert difference(model(noise()), expected_BY) < 1e-5


def test_a_config_file_supplies_what_shapes_do_not_show(tmp_path: Path) -> None:
    about = {
        "model_type": "vit", "num_attention_heads": 6, "layer_norm_eps": 1e-3,
        "hidden_act": "gelu_pytorch_tanh", "image_size": [5, 45],
        "id2label": {str(index): f"c{index}" for index in range(7)},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(about))
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    save_file(make_state("huggingface"), tmp_path / "model.safetensors")
    classifier = vitrail.load(tmp_path, device="cpu")
    model, data = classifier.config.model, classifier.config.data
    assert (model.n_attention_heads, model.layer_norm_eps) == (6, 1e-3)
    assert (model.hidden_act, model.image_size) == ("gelu_tanh", (5, 45))
    assert (data.mean, data.std, data.fit) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash")
    assert classifier.classes[6] == "c6"
    for wrong in ({"hidden_act": "relu"}, {"image_size": "big"}, {"layer_norm_eps": None}):
        (tmp_path / "config.json").write_text(json.dumps(about | wrong))
        with pytest.raises((CheckpointError, ConfigError)):
            vitrail.load(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_mean_of_strings_is_refused(tmp_path: Path, name: str) -> None:
    about = {"num_heads": 6, "pretrained_cfg": {name: ["a", "b", "c"]}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(make_state("timm"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="could not convert string to float"):
        vitrail.load(tmp_path, n_attention_heads=6, device="cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_matching_files_name_their_first_keys(layout: str) -> None:
    state = make_state(layout)
    keys = [key for key in state if "1.fc1" in key or "1.mlp.fc1" in key or "1/MlpBlock_3/" in key
            or "1.intermediate" in key]  # fmt: skip
    key = keys[0]
    with pytest.raises(CheckpointError, match=f"{layout}: {key} is missing"):
        convert({k: t for k, t in state.items() if k != key}, n_attention_heads=3)
    with pytest.raises(CheckpointError, match=rf"{key} has shape \(2, 5\), not \("):
        convert(state | {key: torch.ones(2, 5)}, n_attention_heads=3)
    with pytest.raises(
        CheckpointError, match=r"keys unknown to .*: (\S*more\.\d,? ){3}\(and 2 more\)"
    ):
        convert(state | {f"more.{n}": torch.ones(1) for n in range(1, 6)}, n_attention_heads=3)


def test_unknown_weights_name_their_first_keys() -> None:
    with pytest.raises(CheckpointError, match=r"unrecognized weights format .* keys layer\.weight"):
        convert({"layer.weight": torch.ones(2, 3)})


def test_what_vitrail_cannot_compute_is_refused_by_its_key() -> None:
    for key in ("rope.periods", "norm_pre.bias", "blocks.0.attn.q_norm.weight"):
        with pytest.raises(CheckpointError, match=key):
            convert(make_state("timm") | {key: torch.ones(D)}, n_attention_heads=3)


def make_dinov3(*, gated: bool = False) -> dict[str, Tensor]:
    """Random weights with the names of DINOv3 on Hugging Face: one layer, patches of 8 pixels."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, 24), "embeddings.register_tokens": (1, 4, 24),
        "embeddings.patch_embeddings.weight": (24, 3, 8, 8),
        "embeddings.patch_embeddings.bias": (24,),
        "norm.weight": (24,), "norm.bias": (24,),
    }  # fmt: skip
    sizes = {"attention.q_proj": (24, 24), "attention.k_proj": (24, 24),
             "attention.v_proj": (24, 24), "attention.o_proj": (24, 24), "mlp.up_proj": (40, 24),
             "mlp.down_proj": (24, 40), "norm1": (24,), "norm2": (24,)}  # fmt: skip
    if gated:
        sizes["mlp.gate_proj"] = (40, 24)
    for name, size in sizes.items():
        shapes |= {f"layer.0.{name}.weight": size, f"layer.0.{name}.bias": size[:1]}
    shapes |= {f"layer.0.layer_scale{n}.lambda1": (24,) for n in (1, 2)}
    return {name: torch.randn(size) for name, size in shapes.items()}


def test_dinov3_has_positions_at_every_size_and_is_refused_where_it_differs() -> None:
    about = {"config.json": {"image_size": [16, 24], "num_attention_heads": 3}}
    found = convert(make_dinov3(gated=True), about)
    assert found.layout == "dinov3"
    assert found.config.position == "rope_centered"
    assert (found.config.image_hw, found.config.hidden_act) == ((16, 24), "swiglu")
    assert convert(make_dinov3(), n_attention_heads=3).config.image_hw == (224, 224)
    with pytest.raises(CheckpointError, match="rope_theta is 10000: only 100 is supported"):
        convert(make_dinov3(), {"config.json": {"rope_theta": 10_000}}, n_attention_heads=3)
    with pytest.raises(CheckpointError, match="'gelu' with a gate: only silu is supported"):
        convert(make_dinov3(gated=True), {"config.json": {"hidden_act": "gelu"}})
    with pytest.raises(CheckpointError, match=r"unknown to layout dinov3: layer\.0\.q_norm"):
        convert(make_dinov3() | {"layer.0.q_norm.weight": torch.ones(8)}, n_attention_heads=3)
    state = make_dinov3()
    del state["layer.0.mlp.down_proj.bias"]
    with pytest.raises(CheckpointError, match=r"dinov3: layer\.0\.mlp\.down_proj\.bias is missing"):
        convert(state, n_attention_heads=3)


def test_a_guessed_head_count_is_reported() -> None:
    with pytest.raises(CheckpointError, match=r"\(width 24\): give n_attention_heads"):
        convert(make_state("timm"))
    with pytest.raises(ConfigError, match="n_attention_heads 7"):
        convert(make_state("reference"), n_attention_heads=7)
    assert any("assumed n_attention_heads 4" in n for n in convert(make_state("reference")).notes)
    with pytest.raises(CheckpointError, match="3 attention heads, not 4"):
        convert(make_state("google"), n_attention_heads=4)


@pytest.mark.parametrize(
    ("changes", "layout", "words"),
    [
        ({"stem": "conv", "patch_size": 4}, "timm", "support stem conv: train with --stem patch$"),
        (
            {"position": "rope"},
            "huggingface",
            "position rope: train with --position learned",
        ),
        ({"head": "mlp"}, "huggingface", "does not support head mlp"),
        ({"pool": "mean"}, "huggingface", "does not support pool mean"),
        ({}, "google", "hidden_act gelu, .* --hidden_act gelu_tanh"),
        ({"layer_norm_eps": 1e-4}, "timm", "0.0001: train with --layer_norm_eps 1e-05 or 1e-06"),
    ],
)
def test_what_a_layout_does_not_support_is_refused(
    tiny_model: ModelConfig, changes: dict[str, Any], layout: str, words: str
) -> None:
    config = dataclasses.replace(tiny_model, **({"head": "linear"} | changes))
    with pytest.raises(ConfigError, match=words):
        convert_back(config, VisionTransformer(config).state_dict(), layout)


def test_positions_are_resized_by_keys_cubic() -> None:
    """Against the formula itself, one value at a time."""

    def weight(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    rows, new = (3, 4), (5, 7)
    table = torch.randn(rows[0] * rows[1], 2, generator=torch.Generator().manual_seed(2))
    grid = table.view(*rows, 2).numpy()
    expected = np.zeros((*new, 2))
    for g in range(new[0]):
        for j in range(new[1]):
            y, x = ((i + 0.5) * old / n - 0.5 for i, old, n in zip((g, j), rows, new, strict=True))
            for v in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for u in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    at = grid[min(max(v, 0), rows[0] - 1), min(max(u, 0), rows[1] - 1)]
                    expected[g, j] += weight(y - v) * weight(x - u) * at
    resized = resize_positions(table, rows, new)
    np.testing.assert_allclose(resized.numpy(), expected.reshape(-1, 2), atol=1e-6)
    assert torch.equal(resize_positions(table, rows, rows), table)


def test_parity_with_the_references_own_code(reference: Path) -> None:
    classifier = vitrail.load(reference / "layer3-dim32.pt", device="cpu")
    expected = np.load(reference / "layer3-dim32_expected.npz")
    with torch.no_grad():
        logits_BY, attentions = classifier.model.forward_with_attention(
            torch.from_numpy(expected["images"])
        )
    logits_error = np.abs(logits_BY.numpy() - expected["logits"]).max()
    attention_error = np.abs(torch.stack(attentions).numpy() - expected["attention"]).max()
    print(f"\nthe reference's own: logits {logits_error:.1e}, attention {attention_error:.1e}")
    assert logits_error < 1e-5
    assert attention_error < 1e-6
    assert classifier.classes[0] == "plane"


def test_another_head_count_gives_another_model(reference: Path) -> None:
    path = reference / "layer3-dim32.pt"
    images_BCHW = torch.from_numpy(np.load(path.with_name(f"{path.stem}_expected.npz"))["images"])
    with torch.no_grad():
        four, eight = (
            vitrail.load(path, n_attention_heads=heads, device="cpu").model(images_BCHW)
            for heads in (None, 8)
        )
    assert not torch.allclose(four, eight, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_converts_in_both_directions(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / {"reference": "a.pth", "google": "a.npz"}.get(layout, "a.safetensors")
    state = make_state(layout)
    if layout == "google":
        np.savez(start, **{key: t.numpy() for key, t in state.items()})
    elif layout == "reference":
        torch.save({"epoch": 3, "model": state}, start)
    else:
        save_file(state, start)
    middle = tmp_path / "b.safetensors"
    end = tmp_path / {"reference": "c.pt", "google": "c.npz"}.get(layout, "c")
    assert main(["convert", str(start), str(middle), "--n_attention_heads", "3"]) == 0
    printed = capsys.readouterr().out
    assert f"({layout}, {len(state)} tensors)" in printed
    assert vitrail.load(middle, device="cpu").config.model.layer_norm_eps == {
        "reference": 1e-5, "timm": 1e-6, "google": 1e-6, "huggingface": 1e-12,
    }[layout]  # fmt: skip
    assert main(["convert", str(middle), str(end), "--layout", layout]) == 0
    written, _ = read_state(end if end.suffix else end / "model.safetensors")
    again = vitrail.load(end, n_attention_heads=3, device="cpu")
    before = vitrail.load(middle, device="cpu").model.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(t, before[k]) for k, t in again.model.state_dict().items())


def test_another_image_size_and_another_head(tmp_path: Path, capsys: Any) -> None:
    save_file(make_state("timm"), tmp_path / "a.safetensors")
    words = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"),
             "--n_attention_heads", "3"]  # fmt: skip
    assert main([*words, "--image_size", "35", "--n_classes", "4", "--new_head"]) == 0
    printed = capsys.readouterr().out
    assert "positions resized from 3 x 3 patches to 7 x 7" in printed
    assert "a new head for 4 classes" in printed
    model = vitrail.load(tmp_path / "b.safetensors", device="cpu").model
    before = convert(make_state("timm"), n_attention_heads=3).weights
    assert model(noise(35)).shape == (5, 4)
    expected = resize_positions(before["position_ND"], (GRID, GRID), (7, 7))
    assert torch.equal(model.position_ND, expected)
    assert torch.equal(model.blocks[L - 1].mlp.fc2.weight, before[f"blocks.{L - 1}.mlp.fc2.weight"])
    assert main([*words, "--n_classes", "4"]) == 2
    assert "give --new_head too" in capsys.readouterr().err
    assert main([*words, "--image_size", "34"]) == 2
    assert "image_size 34" in capsys.readouterr().err


def test_weights_without_a_head_show_their_tokens_but_cannot_classify(
    tmp_path: Path, capsys: Any
) -> None:
    state = {k: t for k, t in make_state("huggingface").items() if not k.startswith("classifier")}
    state = {key.removeprefix("vit."): tensor for key, tensor in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    network = vitrail.load(tmp_path / "a.safetensors", n_attention_heads=3, device="cpu")
    picture_HWC = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(ConfigError, match=r"no classes, so it cannot classify.*--new_head"):
        network.predict(picture_HWC)
    with pytest.raises(ConfigError, match="method relevance explains a class"):
        network.explain(picture_HWC, method="relevance")
    for method in ("features", "similarity", "norms", "attention", "rollout"):
        assert network.explain(picture_HWC, method=method).frames[0].prediction == ""
    assert network.explain(picture_HWC).settings.method == "features"
    assert main(["predict", "--model_path", str(tmp_path / "a.safetensors"),
                 "--n_attention_heads", "3", "examples"]) == 2  # fmt: skip
    assert "has no classes" in capsys.readouterr().err
    found = convert(state, n_attention_heads=3)
    assert found.config.n_classes == 0
    assert found.weights["position_ND"].shape == (N, D)
    words = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"),
             "--n_attention_heads", "3", "--image_size", "35"]  # fmt: skip
    assert main([*words, "--new_head"]) == 2
    assert "has no head: give --n_classes N too" in capsys.readouterr().err
    assert main(words) == 0
    assert vitrail.load(tmp_path / "b.safetensors", device="cpu").config.model.image_size == 35
    assert main([*words, "--new_head", "--n_classes", "4"]) == 0


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("embedding/kernel", None, "embedding/kernel is missing"),
        ("embedding/kernel", (4, 4, D), r"embedding/kernel has shape \(4, 4, \d+\)"),
        ("Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel", None, "Dense_0/kernel is missing"),
        ("Transformer/encoderblock_1/MlpBlock_3/Dense_1/kernel", (D,), "Dense_1/kernel has shape"),
    ],
)
def test_errors_about_googles_weights_have_its_names(
    key: str, shape: tuple[int, ...] | None, message: str
) -> None:
    state = make_state("google")
    state = {n: t for n, t in state.items() if n != key}
    if shape:
        state[key] = torch.ones(shape)
    with pytest.raises(CheckpointError, match=message):
        convert(state)


def test_half_precision_is_read(tmp_path: Path) -> None:
    state = {key: tensor.bfloat16() for key, tensor in make_state("timm").items()}
    save_file(state, tmp_path / "a.safetensors")
    model = vitrail.load(tmp_path / "a.safetensors", n_attention_heads=3, device="cpu").model
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.pth"])
def test_broken_files_are_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 nothing of the kind" * 9)
    with pytest.raises(CheckpointError, match=name):
        vitrail.load(tmp_path / name)


@pytest.mark.parametrize("layout", ["google", "reference"])
def test_assumptions_about_files_without_a_config_are_printed(
    tmp_path: Path, layout: str, capsys: Any
) -> None:
    state = make_state(layout)
    start, end = {"google": ("a.npz", "b.npz"), "reference": ("a.pt", "b.pt")}[layout]
    if layout == "google":
        np.savez(tmp_path / start, **{key: t.numpy() for key, t in state.items()})
    else:
        torch.save(state, tmp_path / start)
    words = ["convert", str(tmp_path / start), str(tmp_path / end), "--layout", layout]
    flags = ["--n_attention_heads", "3", "--mean", "0.4", "0.5", "0.6"]
    assert main([*words, *flags]) == 0
    printed = capsys.readouterr().out
    assert "does not say how pictures are prepared: mean (0.4, 0.5, 0.6), std" in printed


def test_names_that_do_not_fit_the_layout_are_refused(tmp_path: Path, capsys: Any) -> None:
    save_file(make_state("timm"), tmp_path / "a.safetensors")
    for dest, layout, words in (
        ("b.pt", "vitrail", "ends in .safetensors"),
        ("b", "google", "ends in .npz"),
        ("b.pt", "timm", "is a folder"),
    ):
        command = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / dest)]
        assert main([*command, "--layout", layout, "--n_attention_heads", "3"]) == 2
        assert words in capsys.readouterr().err


def test_every_hidden_width_round_trips_even_if_timm_rounds_down() -> None:
    """timm computes int(width * mlp_ratio), crops int(side / crop_pct); we round."""
    for width in range(1, 200):
        for hidden in range(width, 5 * width, 7):
            ratio = hidden / width
            config = ModelConfig(embed_dim=width, n_attention_heads=1, forward_mul=ratio)
            assert config.hidden_dim == hidden
            assert int(width * timm._ratio(hidden, width)) == hidden
            assert math.floor(width / timm._share(width, hidden)) == hidden


def test_a_network_without_classes_is_drawn(tmp_path: Path, capsys: Any) -> None:
    state = {k: t for k, t in make_state("huggingface").items() if not k.startswith("classifier")}
    save_file(state, tmp_path / "a.safetensors")
    words = ["explain", "examples/cat.jpg", "--model_path", str(tmp_path / "a.safetensors"),
             "--n_attention_heads", "3", "--output_path", str(tmp_path / "a.png")]  # fmt: skip
    assert main(words) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert main([*words[:-1], str(tmp_path / "a.html")]) == 0
    assert '"predictions":[[],' in (tmp_path / "a.html").read_text()
    for drawing in ("--colormap viridis", "--style reference"):  # features have neither
        assert main([*words, *drawing.split()]) == 0
        assert "through layer" in capsys.readouterr().out


def test_info_of_a_network_without_classes_offers_no_score(tmp_path: Path, capsys: Any) -> None:
    state = {k: t for k, t in make_state("huggingface").items() if not k.startswith("classifier")}
    save_file(state, tmp_path / "a.safetensors")
    assert main(["info", str(tmp_path / "a.safetensors"), "--n_attention_heads", "3"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"classes +│ none", shown)
    assert "--score" not in shown


@pytest.mark.parametrize("layout", ["timm", "huggingface", "google", "reference", "vitrail"])
def test_the_loss_of_the_temperature_is_said(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(
        image_size=8, patch_size=4, embed_dim=8, n_layers=1, n_attention_heads=2, n_classes=3,
        head="mlp" if layout == "reference" else "linear",
        hidden_act="gelu_tanh" if layout == "google" else "gelu",
        layer_norm_eps=1e-6 if layout == "google" else 1e-5,
    )  # fmt: skip
    calibration = Calibration(0.78, smoothing=0.1)
    info = CheckpointInfo(Config(model=config), ("a", "b", "c"), {}, {}, calibration)
    save_weights_file(tmp_path / "a.safetensors", info, VisionTransformer(config).state_dict())
    end = tmp_path / {"reference": "c.pt", "google": "c.npz", "vitrail": "c.safetensors"}.get(
        layout, "c"
    )
    assert main(["convert", str(tmp_path / "a.safetensors"), str(end), "--layout", layout]) == 0
    output = capsys.readouterr().out
    for words in (
        f"{layout} cannot store the temperature 0.78",
        "to calibrate them, undo the label smoothing 0.1 and divide",
    ):
        assert (words in output) == (layout != "vitrail")


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"pool": "mean"}, {"pool": "mean", "class_token": True, "fc_norm": True},
        {"hidden_act": "gelu_tanh"},
    ],
    ids=str,
)  # fmt: skip
def test_timms_config_states_what_its_own_model_needs(changes: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"image_size": (20, 30), "patch_size": 5, "forward_mul": 1.75}
    config = ModelConfig(n_classes=7, head="linear", **shape, **changes)
    about = timm._describe(config, DataConfig(fit="squash"), tuple("abcdefg"))["config.json"]
    assert about["model_args"] == {
        "img_size": [20, 30], "patch_size": 5, "in_chans": 3, "embed_dim": 128, "depth": 6,
        "num_heads": 4, "mlp_ratio": 1.75, "class_token": config.has_class_token,
        "global_pool": "token" if config.pool == "cls" else "avg", "fc_norm": config.fc_norm,
        "pre_norm": False, "act_layer": config.hidden_act,
    }  # fmt: skip
