"""Maps of a model: each method against its formula, batches, chunks, threads, what is refused."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitrail
from test_formulas import gradient_rollout, relevance
from vitrail.config.settings import ModelConfig
from vitrail.errors import ConfigError
from vitrail.explain import balanced, formulas, methods
from vitrail.explain.map_settings import METHODS, VIEWS, MapSettings, Method
from vitrail.explain.methods import (
    Maps,
    attention_by_head,
    attention_by_query,
    compute_maps,
    early_logits,
)
from vitrail.model.layers import LayerScale
from vitrail.model.vit import VisionTransformer

MakeModel = Callable[..., VisionTransformer]
CLASSES = torch.tensor([6, 0, 3, 3, 1])
ALONE: tuple[Method, ...] = (*METHODS, "similarity", "norms")
"""Methods by which no image's map depends on another image."""
ACCUMULATING: tuple[Method, ...] = ("rollout", "gradient_rollout", "relevance")


def head_row(flow_BTT: Tensor, pool: str) -> Tensor:
    """What the head reads of a flow, written independently: (B, 5, 7)."""
    row_BN = flow_BTT[:, 0, 1:] if pool == "cls" else flow_BTT.mean(1)
    return row_BN.reshape(-1, 5, 7)


def assert_same(ours: Maps, other: Maps) -> None:
    """Compare to the last digits that another batch size may round otherwise."""
    torch.testing.assert_close(ours.values_BLGJ, other.values_BLGJ, atol=2e-6, rtol=2e-4)
    torch.testing.assert_close(ours.logits_BY, other.logits_BY, atol=2e-5, rtol=2e-4)
    assert torch.equal(ours.classes_B, other.classes_B)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_attention_is_the_models_own(make_model: MakeModel, images_BCHW: Tensor, pool: str) -> None:
    model = make_model(pool)
    with torch.no_grad():
        logits_BY, attentions = model.forward_with_attention(images_BCHW)
    result = compute_maps(model, images_BCHW, MapSettings())
    assert result.layers == (1, 2, 3)
    torch.testing.assert_close(result.logits_BY, logits_BY)
    assert torch.equal(result.classes_B, logits_BY.argmax(1))
    for index, attention_BATT in enumerate(attentions):
        expected_BGJ = head_row(attention_BATT.mean(1), pool)
        torch.testing.assert_close(result.values_BLGJ[:, index], expected_BGJ)


# Not those that hide patches: bfloat16 rounds away such differences in an untrained model.
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("occlusion", "shapley")])
def test_maps_in_bfloat16_are_nearly_those_in_float32(
    tiny_model: ModelConfig, images_BCHW: Tensor, method: Method
) -> None:
    torch.manual_seed(4)
    model = VisionTransformer(dataclasses.replace(tiny_model, pool="mean")).eval()
    settings = MapSettings(method=method)
    expected = compute_maps(model, images_BCHW, settings, classes_B=CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        ours = compute_maps(model, images_BCHW, settings, classes_B=CLASSES)
    assert ours.values_BLGJ.dtype == torch.float32
    highest = float(expected.values_BLGJ.abs().max())
    difference = (ours.values_BLGJ - expected.values_BLGJ).abs().max() / highest
    assert 0 < difference < 0.1


def test_layers_heads_fusion_and_query_change_the_attention_shown(
    make_model: MakeModel, images_BCHW: Tensor
) -> None:
    model = make_model()
    settings = MapSettings(fusion="max", heads=(3, 1), layers=(3, 1), query=(4, 2))
    result = compute_maps(model, images_BCHW, settings)
    assert result.layers == (1, 3)
    with torch.no_grad():
        _, attentions = model.forward_with_attention(images_BCHW)
    for index, layer in enumerate((0, 2)):
        heads_BAN = attentions[layer][:, :, 1 + 4 * 7 + 2, 1:]
        expected_BN = torch.maximum(heads_BAN[:, 0], heads_BAN[:, 2])
        torch.testing.assert_close(result.values_BLGJ[:, index].flatten(1), expected_BN)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("method", ACCUMULATING)
def test_what_accumulates_is_its_formula_on_the_models_attention(
    make_model: MakeModel, images_BCHW: Tensor, pool: str, method: Method
) -> None:
    model = make_model(pool)
    logits_BY, attentions = model.forward_with_attention(images_BCHW)
    named_BY = torch.nn.functional.one_hot(CLASSES, 7)
    gradients = torch.autograd.grad((logits_BY * named_BY).sum(), attentions)
    flow_BLTT = {
        "rollout": lambda: formulas.rollout([a.mean(1) for a in attentions]),
        "gradient_rollout": lambda: gradient_rollout(attentions, gradients),
        "relevance": lambda: relevance(attentions, gradients),
    }[method]().detach()
    settings = MapSettings(method=method, chunk=2)
    result = compute_maps(model, images_BCHW, settings, classes_B=CLASSES)
    assert torch.equal(result.classes_B, CLASSES)
    for index in range(3):
        expected_BGJ = head_row(flow_BLTT[:, index], pool)
        torch.testing.assert_close(result.values_BLGJ[:, index], expected_BGJ)
    last = dataclasses.replace(settings, layers=(2,))
    alone = compute_maps(model, images_BCHW, last, classes_B=CLASSES)
    assert alone.layers == (2,)
    torch.testing.assert_close(alone.values_BLGJ[:, 0], result.values_BLGJ[:, 1])


@pytest.mark.parametrize("method", ["rollout", "gradient_rollout"])
def test_discarding_changes_a_rollout_and_spares_the_class_token(
    make_model: MakeModel, images_BCHW: Tensor, method: Method
) -> None:
    model = make_model()
    plain, discarding = (
        compute_maps(model, images_BCHW, MapSettings(method=method, discard_ratio=ratio))
        for ratio in (0.0, 0.97)
    )
    assert not torch.allclose(plain.values_BLGJ, discarding.values_BLGJ)
    logits_BY, attentions = model.forward_with_attention(images_BCHW)
    if method == "rollout":
        fused = [formulas.discard_lowest(a.mean(1), 0.97, class_token=True) for a in attentions]
        flow_BLTT = formulas.rollout(fused)
    else:
        gradients = torch.autograd.grad(logits_BY.amax(1).sum(), attentions)
        flow_BLTT = gradient_rollout(attentions, gradients, 0.97, class_token=True)
    expected_BGJ = head_row(flow_BLTT[:, -1].detach(), "cls")
    # What is discarded is small, so compare closely.
    torch.testing.assert_close(discarding.values_BLGJ[:, -1], expected_BGJ, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_gradcam_is_its_formula_on_what_the_last_block_reads(
    make_model: MakeModel, images_BCHW: Tensor, pool: str
) -> None:
    model = make_model(pool)
    caught: list[Tensor] = []

    def catch(_: object, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].retain_grad()
        caught.append(arguments[0])

    handle = model.blocks[-1].register_forward_pre_hook(catch)
    model(images_BCHW).gather(1, CLASSES[:, None]).sum().backward()
    handle.remove()
    first = int(pool == "cls")
    assert caught[0].grad is not None
    tokens_BND, gradient_BND = caught[0].detach()[:, first:], caught[0].grad[:, first:]
    expected_BN = torch.einsum("bd,bnd->bn", gradient_BND.mean(1), tokens_BND).clamp(min=0)

    result = compute_maps(model, images_BCHW, MapSettings(method="gradcam"), classes_B=CLASSES)
    assert result.layers == (0,)
    assert expected_BN.gt(0).any()
    torch.testing.assert_close(result.values_BLGJ.flatten(1), expected_BN)


@pytest.mark.parametrize(("pool", "against"), [("cls", None), ("mean", None), ("mean", 1)])
def test_occlusion_is_the_drop_of_the_score(
    make_model: MakeModel, images_BCHW: Tensor, pool: str, against: int | None
) -> None:
    model = make_model(pool)
    settings = MapSettings(method="occlusion", chunk=12, window=1, against=against)
    result = compute_maps(model, images_BCHW, settings, classes_B=CLASSES)
    assert result.values_BLGJ.shape == (5, 1, 5, 7)
    assert result.values_BLGJ.abs().max() > 1e-3
    with torch.no_grad():
        for row, column in ((0, 0), (4, 6), (2, 5)):
            hidden_BCHW = images_BCHW.clone()
            place = hidden_BCHW[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            place[:] = images_BCHW.mean((2, 3))[:, :, None, None]
            drop_BY = model(images_BCHW) - model(hidden_BCHW)
            expected_B = drop_BY.gather(1, CLASSES[:, None])[:, 0]
            if against is not None:
                expected_B = expected_B - drop_BY[:, against]
            torch.testing.assert_close(
                result.values_BLGJ[:, 0, row, column], expected_B, atol=1e-5, rtol=1e-4
            )


def few_passes(method: Method, **changes: Any) -> MapSettings:
    """The settings of a method; Shapley values by two orders of the patches, not seven."""
    passes = {"passes": 140} if method == "shapley" else {}
    return MapSettings(method, **passes, **changes)


@pytest.mark.parametrize("method", ALONE)
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_batch_equals_single_calls(
    make_model: MakeModel, images_BCHW: Tensor, pool: str, method: Method
) -> None:
    model = make_model(pool)
    batch = compute_maps(model, images_BCHW, few_passes(method, chunk=3))
    for index in range(5):
        image_BCHW = images_BCHW[index : index + 1]
        single = compute_maps(model, image_BCHW, few_passes(method))
        fields = (batch.values_BLGJ, batch.logits_BY, batch.classes_B)
        values_BLGJ, logits_BY, classes_B = (field[index : index + 1] for field in fields)
        assert_same(Maps(values_BLGJ, batch.layers, logits_BY, classes_B), single)


@pytest.mark.parametrize("method", [*METHODS, *VIEWS])
def test_a_named_class_is_the_one_explained(
    make_model: MakeModel, images_BCHW: Tensor, method: Method
) -> None:
    model, settings = make_model(), few_passes(method)
    predicted = compute_maps(model, images_BCHW, settings)
    same = compute_maps(model, images_BCHW, settings, classes_B=predicted.classes_B)
    assert_same(predicted, same)
    other = compute_maps(model, images_BCHW, settings, classes_B=(predicted.classes_B + 1) % 7)
    differs = not torch.allclose(predicted.values_BLGJ, other.values_BLGJ, atol=1e-4)
    assert differs == (method not in ("attention", "rollout", *VIEWS))


def test_threads_give_exactly_the_serial_result(make_model: MakeModel) -> None:
    model = make_model()
    generator = torch.Generator().manual_seed(8)
    images = [torch.randn(1, 3, 20, 28, generator=generator) for _ in range(32)]
    every = (*METHODS, *VIEWS)
    jobs = [(image, every[index % len(every)]) for index, image in enumerate(images)]

    def explain(job: tuple[Tensor, Method]) -> Maps:
        return compute_maps(model, job[0], MapSettings(method=job[1]))

    serial = [explain(job) for job in jobs]
    with ThreadPoolExecutor(32) as pool:
        parallel = list(pool.map(explain, jobs))
    for one, other in zip(serial, parallel, strict=True):
        assert torch.equal(one.values_BLGJ, other.values_BLGJ)
        assert torch.equal(one.logits_BY, other.logits_BY)


@pytest.mark.parametrize("method", [*METHODS, *VIEWS])
def test_the_callers_gradient_mode_does_not_matter(
    make_model: MakeModel, images_BCHW: Tensor, method: Method
) -> None:
    model, settings = make_model(position="rope", pool="mean"), few_passes(method)
    plain = compute_maps(model, images_BCHW, settings, classes_B=CLASSES)
    model.requires_grad_(False)
    with torch.inference_mode():
        inferred = compute_maps(model, images_BCHW.clone(), settings, classes_B=CLASSES.clone())
        assert torch.is_inference_mode_enabled()
    for result in (plain, inferred):
        assert not result.values_BLGJ.requires_grad
        assert not result.values_BLGJ.is_inference()
    assert_same(plain, inferred)


@pytest.mark.parametrize("method", [*METHODS, *VIEWS])
def test_explaining_does_not_change_the_model(
    make_model: MakeModel, images_BCHW: Tensor, method: Method
) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compute_maps(model, images_BCHW, MapSettings(method=method))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        assert parameter.requires_grad, name


def test_balanced_runs_the_images_once_per_point(
    make_model: MakeModel, images_BCHW: Tensor
) -> None:
    model, runs = make_model("mean"), []
    model.stem.register_forward_pre_hook(lambda *_: runs.append(1))
    for points in (1, 3):
        runs.clear()
        maps = compute_maps(model, images_BCHW, MapSettings(method="balanced", points=points))
        assert len(runs) == points
        with torch.no_grad():
            torch.testing.assert_close(maps.logits_BY, model(images_BCHW))


@pytest.mark.parametrize("method", [*METHODS, *VIEWS])
def test_no_more_images_than_the_chunk_are_in_the_model_at_once(
    make_model: MakeModel, images_BCHW: Tensor, method: Method
) -> None:
    model, sizes = make_model(), []
    model.stem.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
    compute_maps(model, images_BCHW, few_passes(method, chunk=3))
    assert max(sizes) == 3


def test_contrast_is_the_difference_of_two_logits(
    make_model: MakeModel, images_BCHW: Tensor
) -> None:
    model = make_model("mean")
    for method in ("balanced", "integrated_gradients"):
        own, other, contrast = (
            compute_maps(
                model, images_BCHW, MapSettings(method=method, against=against), classes_B=c
            )
            for c, against in ((CLASSES, None), (torch.full((5,), 2), None), (CLASSES, 2))
        )
        expected_BLGJ = own.values_BLGJ - other.values_BLGJ
        torch.testing.assert_close(contrast.values_BLGJ, expected_BLGJ, rtol=1e-3, atol=1e-5)
    for method in ("relevance", "gradient_rollout", "gradcam"):
        own, contrast = (
            compute_maps(
                model, images_BCHW, MapSettings(method=method, against=a), classes_B=CLASSES
            )
            for a in (None, 2)
        )
        assert not torch.allclose(own.values_BLGJ, contrast.values_BLGJ)
    with pytest.raises(ConfigError, match="class 7 is not in the model"):
        compute_maps(model, images_BCHW, MapSettings(method="balanced", against=7))


def test_patches_are_sums_of_pixels(make_model: MakeModel, images_BCHW: Tensor) -> None:
    model = make_model("mean", stem="conv")
    pixels, patches = (
        compute_maps(model, images_BCHW, MapSettings(method="balanced", resolution=resolution))
        for resolution in ("pixel", "patch")
    )
    assert pixels.values_BLGJ.shape == (5, 1, 20, 28)
    sums = pixels.values_BLGJ.unflatten(3, (7, 4)).unflatten(2, (5, 4)).sum((3, 5))
    torch.testing.assert_close(patches.values_BLGJ, sums)
    assert patches.values_BLGJ.min() < 0 < patches.values_BLGJ.max()


def test_relevance_with_balanced_gradients(make_model: MakeModel, images_BCHW: Tensor) -> None:
    model = make_model("mean")
    plain, ours = (
        compute_maps(model, images_BCHW, MapSettings(method="relevance", gradients=gradients))
        for gradients in ("plain", "balanced")
    )
    logits_BY, attentions = balanced.logits(model, model.embed(images_BCHW))
    gradients = torch.autograd.grad(logits_BY.amax(1).sum(), attentions)
    expected = relevance([a.detach() for a in attentions], gradients)
    torch.testing.assert_close(ours.values_BLGJ[:, 2], head_row(expected[:, 2], "mean"))
    assert not torch.allclose(plain.values_BLGJ, ours.values_BLGJ)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_norms_of_contributions(make_model: MakeModel, images_BCHW: Tensor, pool: str) -> None:
    """Against every contribution written out: x_i [i = j] + sum over heads of A_ij W v_j."""
    model = make_model(pool)
    tokens_BTD, steps = model.embed(images_BCHW), []
    for block in model.blocks:
        attention = block.attention
        normed_BTD = block.norm1(tokens_BTD)
        _, attention_BATT = attention(normed_BTD, None, keep_attention=True)
        B, T, D = tokens_BTD.shape
        values_BTAK = attention.qkv(normed_BTD).view(B, T, 3, 3, D // 3)[:, :, 2]
        by_head = attention.out_projection.weight.view(D, 3, D // 3)
        parts = torch.einsum("bhij,bjhk,dhk->bijd", attention_BATT, values_BTAK, by_head)
        parts = parts + torch.diag_embed(tokens_BTD.mT).permute(0, 2, 3, 1)
        norms_BTT = parts.norm(dim=-1)
        steps.append(norms_BTT / norms_BTT.sum(-1, keepdim=True))
        tokens_BTD, _ = block(tokens_BTD)
    settings = MapSettings(method="rollout", fusion="norm")
    result = compute_maps(model, images_BCHW, settings)
    flow_BTT = steps[1] @ steps[0]
    torch.testing.assert_close(result.values_BLGJ[:, 1], head_row(flow_BTT.detach(), pool))
    # A scaled branch adds what it adds with the scale folded into its weights.
    scale_D = torch.linspace(0.5, 2, model.config.embed_dim)
    for block in model.blocks:
        block.scale1 = LayerScale(model.config.embed_dim, 1.0)
        block.scale1.weight.data.copy_(scale_D)
    scaled = compute_maps(model, images_BCHW, settings)
    for block in model.blocks:
        block.scale1 = torch.nn.Identity()
        block.attention.out_projection.weight.data.mul_(scale_D[:, None])
        block.attention.out_projection.bias.data.mul_(scale_D)
    folded = compute_maps(model, images_BCHW, settings)
    torch.testing.assert_close(scaled.values_BLGJ, folded.values_BLGJ)
    assert not torch.allclose(scaled.values_BLGJ, result.values_BLGJ, rtol=0.01)
    # Discarding nearly everything leaves each token itself, and no empty row.
    alone = dataclasses.replace(settings, discard_ratio=0.999)
    kept_BLGJ = compute_maps(model, images_BCHW, alone, classes_B=CLASSES).values_BLGJ
    assert kept_BLGJ.isfinite().all()
    with pytest.raises(ConfigError, match="fusion norm needs method rollout"):
        MapSettings(method="attention", fusion="norm")


@pytest.mark.parametrize("method", METHODS)
def test_no_images_give_no_maps(make_model: MakeModel, method: Method) -> None:
    ratio = 0.5 if "rollout" in method else 0.0
    settings = MapSettings(method=method, discard_ratio=ratio)
    result = compute_maps(make_model(), torch.zeros(0, 3, 20, 28), settings)
    grid = (20, 28) if method in ("balanced", "integrated_gradients") else (5, 7)
    assert result.values_BLGJ.shape == (0, len(result.layers), *grid)
    assert (result.logits_BY.shape, result.classes_B.shape) == ((0, 7), (0,))


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": 3}, {"heads": 1}, {"layers": "2"}, {"query": "2,5"}, {"query": (1, 2, 3)},
        {"query": (1.5, 0)}, {"layers": (1.0,)}, {"method": "occlusion", "window": 1.5},
    ],
)  # fmt: skip
def test_settings_of_another_type_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{list(settings)[-1]} is .*: give "):
        MapSettings(**settings)


def test_parity_with_the_references_own_maps(reference: Path) -> None:
    model = vitrail.load(reference / "layer3-dim32.pt", device="cpu").model
    expected = np.load(reference / "layer3-dim32_expected.npz")
    images_BCHW = torch.from_numpy(expected["images"])
    rolled = compute_maps(model, images_BCHW, MapSettings(method="rollout")).values_BLGJ.numpy()
    masks = rolled / rolled.max((2, 3), keepdims=True)
    assert np.abs(masks - expected["rollout"]).max() < 1e-5
    by_head = attention_by_head(model, images_BCHW).numpy()
    rows = expected["attention"][:, :, :, 0, 1:].reshape(3, 3, 4, 4, 4)
    assert np.abs(by_head - rows.swapaxes(0, 1)).max() < 1e-6
    mean = compute_maps(model, images_BCHW, MapSettings()).values_BLGJ.numpy()
    assert np.abs(mean - rows.swapaxes(0, 1).mean(2)).max() < 1e-6


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("query", [None, (3, 6)])
def test_every_head_is_each_head(
    make_model: MakeModel, images_BCHW: Tensor, pool: str, query: tuple[int, int] | None
) -> None:
    model = make_model(pool)
    by_head_BLAGJ = attention_by_head(model, images_BCHW, query=query, chunk=2)
    assert by_head_BLAGJ.shape == (5, 3, 3, 5, 7)
    for head in (1, 2, 3):
        one = compute_maps(model, images_BCHW, MapSettings(heads=(head,), query=query))
        torch.testing.assert_close(by_head_BLAGJ[:, :, head - 1], one.values_BLGJ)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(("layer", "method", "shown"), [(2, "attention", 2), (None, "rollout", 3)])
def test_every_query_is_each_query(
    make_model: MakeModel,
    images_BCHW: Tensor,
    pool: str,
    layer: int | None,
    method: Method,
    shown: int,
) -> None:
    model = make_model(pool)
    every_BNGJ = attention_by_query(model, images_BCHW, layer=layer, fusion="max", chunk=2)
    assert every_BNGJ.shape == (5, 35, 5, 7)
    for row, column in ((0, 0), (1, 6), (4, 3)):
        settings = MapSettings(method=method, fusion="max", query=(row, column), layers=(shown,))
        one = compute_maps(model, images_BCHW, settings).values_BLGJ[:, 0]
        torch.testing.assert_close(every_BNGJ[:, 7 * row + column], one)


def test_early_logits_are_those_of_shorter_models(
    make_model: MakeModel, images_BCHW: Tensor
) -> None:
    model = make_model()
    logits_BLY = early_logits(model, images_BCHW, chunk=2)
    assert logits_BLY.shape == (5, 3, 7)
    for depth in (3, 2, 1):
        del model.blocks[depth:]
        with torch.no_grad():
            torch.testing.assert_close(logits_BLY[:, depth - 1], model(images_BCHW))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "roll_out"}, ["method is 'roll_out'", "relevance", "did you mean 'rollout'"]),
        ({"fusion": "median"}, ["fusion is 'median'", "mean, max, min"]),
        ({"method": "rollout", "discard_ratio": 1.0}, ["discard_ratio is 1.0", "less than 1"]),
        ({"method": "rollout", "discard_ratio": -0.1}, ["discard_ratio is -0.1", "from 0"]),
        ({"chunk": 0}, ["chunk is 0", "at least 1"]),
        ({"discard_ratio": 0.5}, ["discard_ratio", "method attention", "unchanged attention"]),
        (
            {"method": "relevance", "fusion": "max"},
            ["fusion", "relevance", "weights the heads by their gradients"],
        ),
        (
            {"method": "gradient_rollout", "heads": (1,)},
            ["heads", "weights the heads by their gradients"],
        ),
        ({"method": "gradcam", "layers": (1,)}, ["layers", "gradcam", "not its attention"]),
        ({"method": "occlusion", "query": (0, 0)}, ["query", "occlusion", "hides patches"]),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        MapSettings(**settings)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": (2, 4)}, "layer 4 is not in the model: give one from 1 to 3"),
        ({"layers": (0,)}, "layer 0 is not in the model: give one from 1 to 3"),
        ({"layers": ()}, "layers is empty: give at least one from 1 to 3"),
        ({"heads": (9,)}, "head 9 is not in the model: give one from 1 to 3"),
        ({"query": (5, 0)}, "query (5, 0) is outside the picture's 5 x 7 patches"),
        ({"query": (0, 7)}, "a column from 0 to 6"),
        ({"query": (-1, 0)}, "a row from 0 to 4"),
    ],
)
def test_layers_and_heads_that_do_not_exist_are_refused(
    make_model: MakeModel, images_BCHW: Tensor, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        compute_maps(make_model(), images_BCHW, MapSettings(**settings))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("classes_B", "words"),
    [
        (torch.tensor([0, 1, 7, 2, 3]), "class 7 is not in the model: give one from 0 to 6"),
        (torch.tensor([0, 1, -1, 2, 3]), "class -1 is not in the model"),
        (torch.tensor([0, 1]), "of shape (2,): give integers of shape (5,)"),
        (torch.zeros(5), "classes_B is torch.float32"),
    ],
)
def test_invalid_classes_are_refused(
    make_model: MakeModel, images_BCHW: Tensor, classes_B: Tensor, words: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        compute_maps(make_model(), images_BCHW, MapSettings(), classes_B=classes_B)
    assert words in str(refusal.value)


def test_images_of_another_shape_and_a_training_model_are_refused(
    make_model: MakeModel, images_BCHW: Tensor
) -> None:
    model = make_model()
    for wrong in (images_BCHW[0], images_BCHW.mT, images_BCHW[:, :1]):
        with pytest.raises(ConfigError, match=r"give \(number of images, 3, 20, 28\)"):
            compute_maps(model, wrong, MapSettings())
    for view in (attention_by_head, early_logits):
        with pytest.raises(ConfigError, match="chunk is 0"):
            view(model, images_BCHW, chunk=0)
    with pytest.raises(ConfigError, match="layer 4 is not in the model"):
        attention_by_query(model, images_BCHW, layer=4)
    with pytest.raises(ConfigError, match=r"training mode: call model\.eval"):
        compute_maps(model.train(), images_BCHW, MapSettings())


@pytest.mark.parametrize("method", [*METHODS, *VIEWS])
def test_every_method_reads_the_patches_of_a_model_with_registers(
    make_model: MakeModel, images_BCHW: Tensor, method: Method
) -> None:
    model = make_model(n_registers=2, layer_scale=0.5, hidden_act="swiglu")
    settings = few_passes(method)
    maps = compute_maps(model, images_BCHW[:2], settings)
    grid_GJ = (20, 28) if method in ("balanced", "integrated_gradients") else (5, 7)
    assert maps.values_BLGJ.shape[2:4] == grid_GJ
    # The order of registers is free: a map that read one of them as a patch would change.
    with torch.no_grad():
        model.registers_RD.copy_(model.registers_RD.flip(0))
    flipped = compute_maps(model, images_BCHW[:2], settings)
    torch.testing.assert_close(maps.values_BLGJ, flipped.values_BLGJ, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["occlusion", "relevance", "attention"])
def test_many_tokens_are_explained_in_smaller_chunks(
    make_model: MakeModel, images_BCHW: Tensor, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = make_model(), MapSettings(method=method)
    expected = compute_maps(model, images_BCHW, settings)
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    monkeypatch.setattr(methods, "ATTENTION_ENTRIES", 2 * 3 * 36**2 + 1)  # of 2 images
    chunked = compute_maps(model, images_BCHW, settings)
    assert max(seen) == 2
    torch.testing.assert_close(chunked.values_BLGJ, expected.values_BLGJ, atol=1e-6, rtol=1e-4)
