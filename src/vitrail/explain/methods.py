"""A model and images -> maps of what the model looked at.

The maps are on the CPU and not normalized. The model is neither changed nor hooked, so any number
of threads can share one.
"""

import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.explain import balanced, formulas, removal, token_views
from vitrail.explain.checks import (
    check_call,
    check_classes,
    check_has_classes,
    pick,
    require_finite,
)
from vitrail.explain.formulas import HeadFusion
from vitrail.explain.map_settings import SIGNED, SUPPORTED_SETTINGS, VIEWS, MapSettings, Method
from vitrail.explain.removal import class_score
from vitrail.model.layers import LayerScale
from vitrail.model.vit import Block, VisionTransformer

PREDICTED = -1
"""Stands for the class that the model predicts."""
ATTENTION_ENTRIES = 2**25
"""Maximum entries of one layer's attention in a chunk; bounds the memory for many tokens."""


@dataclass(frozen=True)
class Maps:
    """Maps of some images, on the CPU, float32, not normalized.

    Shapes:
        values_BLGJ, with one value per patch, or per pixel (G, J are then H, W); for features a
        color from 0 to 1, (B, L, G, J, 3); logits_BY; classes_B, the class that each image's maps
        explain (-1 if the model has none).
    """

    values_BLGJ: Tensor
    layers: tuple[int, ...]
    """The layer of each index of L, ascending, from 1; (0,) for a method that has no layers."""
    logits_BY: Tensor
    classes_B: Tensor
    signed: bool = False
    """Whether negative values count against the class."""
    query: tuple[int, int] | None = None
    """The selected patch (row, column); for similarity, by default the central one."""
    errors_BLGJ: Tensor | None = None
    """Standard errors of Shapley values: NaN for one pair of orders; None for other methods."""


_Explained = tuple[Tensor, ...]
"""What a method returns for some images: values_BLGJ, logits_BY, classes_B, maybe errors_BLGJ."""


def compute_maps(
    model: VisionTransformer,
    images_BCHW: Tensor,
    settings: MapSettings,
    *,
    classes_B: Tensor | None = None,
    basis: token_views.ColorBasis | None = None,
) -> Maps:
    """Return the maps of each image for the given classes. Default: the predicted ones.

    ``attention``, ``rollout`` and the views are the same for every class. An image's maps do not
    depend on the other images, except for ``features``: its colors are those of ``basis``, by
    default fitted to all these images together.

    Raises:
        ConfigError: the model has no such layer, head, query or class, the images do not have the
            model's shape, or the model is in training mode.
        CheckpointError: the model's output is not finite.
    """
    check_call(model, chunk=settings.chunk, query=settings.query)
    check_has_classes(model, settings.method)
    layers = pick("layer", settings.layers, model.config.n_layers)
    pick("head", settings.heads, model.config.n_attention_heads)
    if settings.against is not None:
        check_classes(torch.tensor([settings.against]), 1, model.config.n_classes)
    if classes_B is None:
        classes_B = torch.full((len(images_BCHW),), PREDICTED)
    else:
        check_classes(classes_B, len(images_BCHW), model.config.n_classes)
    settings = replace(settings, chunk=min(settings.chunk, fitting(model)))
    settings, basis = token_views.complete(model, images_BCHW, settings, basis)

    def compute(images_BCHW: Tensor, classes_B: Tensor) -> _Explained:
        if settings.method in VIEWS:
            maps_BLGJ, logits_BY = token_views.compute(model, images_BCHW, settings, layers, basis)
            return maps_BLGJ, logits_BY, _choose(logits_BY, classes_B)
        return _COMPUTE[settings.method](model, images_BCHW, classes_B, settings)

    joined = _in_chunks(model, settings.chunk, compute, images_BCHW, classes_B.long())
    values_BLGJ, logits_BY, chosen_B, *errors = joined
    require_finite(values_BLGJ, logits_BY)
    return Maps(
        values_BLGJ.float(),
        layers if "layers" in SUPPORTED_SETTINGS[settings.method] else (0,),
        logits_BY[:, : model.config.n_classes].float(),  # without classes they are not logits
        chosen_B if model.config.n_classes else classes_B,
        signed=settings.method in SIGNED,
        query=settings.query,
        errors_BLGJ=errors[0].float() if errors else None,
    )


# The methods, each for one chunk of images.


def _attention_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return the attention of single layers: softmax(Q K^T / sqrt(K)), heads fused.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """

    def look(attention_BATT: Tensor) -> Tensor:
        return read_maps(model, _fuse(attention_BATT, settings), settings.query)

    layers = pick("layer", settings.layers, model.config.n_layers)
    logits_BY, maps_L = _run(model, model.embed(images_BCHW), layers, look)
    return torch.stack(maps_L, dim=1), logits_BY, _choose(logits_BY, classes_B)


def _rollout_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return attention rollout; formula and source: ``formulas.rollout``."""

    def discard(steps_BTT: Tensor) -> Tensor:
        return formulas.discard_lowest(
            steps_BTT, settings.discard_ratio, class_token=model.config.has_class_token
        )

    layers = pick("layer", settings.layers, model.config.n_layers)
    used, tokens_BTD = range(1, layers[-1] + 1), model.embed(images_BCHW)
    if settings.fusion == "norm":
        logits_BY, norms_L = _run_norms(model, tokens_BTD)
        # Each token's own norm is always kept, like the identity in a rollout: no row is empty.
        own_L = [torch.diag_embed(norms_BTT.diagonal(dim1=1, dim2=2)) for norms_BTT in norms_L]
        flow_BLTT = formulas.accumulate(
            [torch.maximum(discard(norms_L[layer - 1]), own_L[layer - 1]) for layer in used]
        )
    else:
        logits_BY, fused_L = _run(model, tokens_BTD, used, lambda a: discard(_fuse(a, settings)))
        flow_BLTT = formulas.rollout(fused_L)
    shown_BLTT = flow_BLTT[:, [layer - 1 for layer in layers]]
    values_BLGJ = read_maps(model, shown_BLTT, settings.query)
    return values_BLGJ, logits_BY, _choose(logits_BY, classes_B)


def _gradient_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return gradient rollout or relevance; formulas and sources are in ``formulas``.

    The gradient is that of the class's logit. The gradient of the sum over a chunk is each image's
    own, since no image's logits depend on another image.
    """
    layers = pick("layer", settings.layers, model.config.n_layers)
    tokens_BTD = model.embed(images_BCHW)
    with torch.enable_grad():
        # Tokens that require a gradient get one even if the model's weights are frozen.
        tokens_BTD = tokens_BTD.detach().requires_grad_()
        if settings.gradients == "balanced":
            logits_BY, attentions_L = balanced.logits(model, tokens_BTD)
            attentions_L = attentions_L[: layers[-1]]
        else:
            logits_BY, attentions_L = _run(model, tokens_BTD, range(1, layers[-1] + 1))
        chosen_B = _choose(logits_BY, classes_B)
        score_B = class_score(chosen_B, settings.against)(logits_BY, torch.arange(len(chosen_B)))
        by_relevance = settings.method == "relevance"
        step = formulas.relevance_step if by_relevance else formulas.gradient_rollout_step
        steps_L = _weigh(score_B.sum(), tokens_BTD, attentions_L, step)
    if by_relevance:
        flow_BLTT = formulas.accumulate_relevance(steps_L)
    else:
        ratio, class_token = settings.discard_ratio, model.config.has_class_token
        flow_BLTT = formulas.rollout(
            [formulas.discard_lowest(s_BTT, ratio, class_token=class_token) for s_BTT in steps_L]
        )
    shown_BLTT = flow_BLTT[:, [layer - 1 for layer in layers]]
    values_BLGJ = read_maps(model, shown_BLTT, settings.query)
    return values_BLGJ, logits_BY.detach(), chosen_B


def _weigh(
    score: Tensor,
    tokens_BTD: Tensor,
    attentions_L: Sequence[Tensor],
    step: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """Return ``step`` of each layer's attention and gradient, keeping one gradient in memory."""
    steps: dict[int, Tensor] = {}
    leaves = all(attention_BATT.is_leaf for attention_BATT in attentions_L)

    def take(layer: int, gradient_BATT: Tensor) -> Tensor | None:
        steps[layer] = step(attentions_L[layer].detach(), gradient_BATT)
        # A leaf's gradient would be kept until the end; no other gradient depends on it.
        return gradient_BATT.new_zeros(()).expand_as(gradient_BATT) if leaves else None

    hooks = [each.register_hook(partial(take, layer)) for layer, each in enumerate(attentions_L)]
    torch.autograd.grad(score, attentions_L if leaves else tokens_BTD)
    for hook in hooks:
        hook.remove()
    return [steps[layer] for layer in range(len(attentions_L))]


def _gradcam_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return Grad-CAM of the tokens that the last block reads: ``(sum_d w_d tokens_nd)+``.

    ``w_d`` is the gradient of the class's logit with respect to the tokens, averaged over the
    patches. The tokens are the last block's input, before its norm: after the block, a class token
    no longer reads the patches, so they have no gradient; and the norm's output would leave out the
    residual branch, through which mean pooling reads them.

    Source: Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2.
    """
    tokens_BTD = model.embed(images_BCHW)
    for _, output_BTD, _ in itertools.islice(model.run_blocks(tokens_BTD), len(model.blocks) - 1):
        tokens_BTD = output_BTD
    with torch.enable_grad():
        tokens_BTD = tokens_BTD.detach().requires_grad_()
        logits_BY = model.classify(model.blocks[-1](tokens_BTD, model.rotation)[0])
        chosen_B = _choose(logits_BY, classes_B)
        score_B = class_score(chosen_B, settings.against)(logits_BY, torch.arange(len(chosen_B)))
        (gradient_BTD,) = torch.autograd.grad(score_B.sum(), tokens_BTD)
    first = model.config.n_prefix_tokens
    weights_B1D = gradient_BTD[:, first:].mean(dim=1, keepdim=True)
    map_BN = (weights_B1D * tokens_BTD.detach()[:, first:]).sum(dim=2).relu()
    values_B1GJ = map_BN.view(-1, 1, *model.config.grid_GJ)
    return values_B1GJ, logits_BY.detach(), chosen_B


def _pixel_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return the balanced gradient or integrated gradients; see ``balanced``."""
    own = [] if settings.method == "balanced" else [model(images_BCHW)]

    def score(logits_BY: Tensor, image_B: Tensor) -> Tensor:
        own.append(logits_BY.detach())  # the first are those of the images themselves
        return class_score(_choose(own[0], classes_B), settings.against)(logits_BY, image_B)

    if settings.method == "balanced":
        pixels_BHW = balanced.contributions(model, images_BCHW, score, points=settings.points or 1)
    else:
        pixels_BHW = balanced.integrated_gradients(
            model, images_BCHW, score, points=settings.points or 16
        )
    if settings.resolution == "patch":
        P = model.config.patch_size
        pixels_BHW = F.avg_pool2d(pixels_BHW, P) * P**2
    return pixels_BHW[:, None], own[0], _choose(own[0], classes_B)


def _removal_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> _Explained:
    """Return occlusion or Shapley values; see ``removal``."""
    logits_BY = model(images_BCHW)
    chosen_B = _choose(logits_BY, classes_B)
    score = class_score(chosen_B, settings.against)
    maps = removal.compute(model, images_BCHW, score, settings)
    values_B1GJ, *errors = (map_BGJ[:, None] for map_BGJ in maps)
    return values_B1GJ, logits_BY, chosen_B, *errors


_COMPUTE: dict[Method, Callable[[VisionTransformer, Tensor, Tensor, MapSettings], _Explained]] = {
    "attention": _attention_maps,
    "rollout": _rollout_maps,
    "gradient_rollout": _gradient_maps,
    "relevance": _gradient_maps,
    "gradcam": _gradcam_maps,
    "balanced": _pixel_maps,
    "integrated_gradients": _pixel_maps,
    "occlusion": _removal_maps,
    "shapley": _removal_maps,
}


# Every head, every query, every depth at once.


def attention_by_head(
    model: VisionTransformer,
    images_BCHW: Tensor,
    *,
    query: tuple[int, int] | None = None,
    chunk: int = 64,
) -> Tensor:
    """Return the attention of every layer and head, as read by ``read_maps``: maps_BLAGJ.

    Raises:
        ConfigError: as ``compute_maps``.
    """
    check_call(model, chunk=chunk, query=query)
    layers = pick("layer", None, model.config.n_layers)

    def look(attention_BATT: Tensor) -> Tensor:
        return read_maps(model, attention_BATT, query)

    def compute(images_BCHW: Tensor) -> tuple[Tensor]:
        return (torch.stack(_run(model, model.embed(images_BCHW), layers, look)[1], dim=1),)

    return _in_chunks(model, chunk, compute, images_BCHW)[0]


def contributions_by_layer(
    model: VisionTransformer,
    images_BCHW: Tensor,
    classes_B: Tensor,
    *,
    against: int | None = None,
    chunk: int = 64,
) -> Tensor:
    """Return what each patch's token contributes to the class's logit: maps_BLGJ.

    The first of L is before layer 1, the others are after each layer; see ``balanced.by_layer``.

    Raises:
        ConfigError: as ``compute_maps``.
    """
    check_call(model, chunk=chunk)

    def compute(images_BCHW: Tensor, classes_B: Tensor) -> tuple[Tensor]:
        return (balanced.by_layer(model, images_BCHW, class_score(classes_B, against)),)

    terms_BLT = _in_chunks(model, chunk, compute, images_BCHW, classes_B)[0]
    terms_BLN = terms_BLT[:, :, model.config.n_prefix_tokens :].float()
    return terms_BLN.reshape(*terms_BLN.shape[:2], *model.config.grid_GJ)


def attention_by_query(
    model: VisionTransformer,
    images_BCHW: Tensor,
    *,
    layer: int | None,
    fusion: HeadFusion = "mean",
    chunk: int = 64,
) -> Tensor:
    """Return what every patch, row by row, takes from every patch: maps_BNGJ.

    ``layer``, from 1, selects that layer's fused attention; None, the rollout through all layers.

    Raises:
        ConfigError: as ``compute_maps``.
    """
    check_call(model, chunk=chunk)
    layers = pick("layer", None if layer is None else (layer,), model.config.n_layers)

    def look(attention_BATT: Tensor) -> Tensor:
        return formulas.fuse_heads(attention_BATT, fusion)

    def compute(images_BCHW: Tensor) -> tuple[Tensor]:
        _, fused_L = _run(model, model.embed(images_BCHW), layers, look)
        flow_BTT = formulas.rollout(fused_L)[:, -1] if layer is None else fused_L[0]
        return (formulas.read_every_query(flow_BTT, model.config.grid_GJ),)

    return _in_chunks(model, chunk, compute, images_BCHW)[0]


def early_logits(model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64) -> Tensor:
    """Return what would be predicted if the network ended after block 1, 2, ... L: logits_BLY.

    The model's last norm and head read the output of each block.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Raises:
        ConfigError: as ``compute_maps``.
    """
    check_call(model, chunk=chunk)

    def compute(images_BCHW: Tensor) -> tuple[Tensor]:
        blocks = model.run_blocks(model.embed(images_BCHW))
        return (torch.stack([model.classify(tokens_BTD) for _, tokens_BTD, _ in blocks], dim=1),)

    return _in_chunks(model, chunk, compute, images_BCHW)[0]


# Running the model.


def _run(
    model: VisionTransformer,
    tokens_BTD: Tensor,
    layers: Container[int],
    look: Callable[[Tensor], Tensor] = lambda attention_BATT: attention_BATT,
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and ``look(attention_BATT)`` for each of some layers, from 1."""
    seen = []
    for _, output_BTD, attention_BATT in model.run_blocks(tokens_BTD, keep_attention=layers):
        tokens_BTD = output_BTD
        if attention_BATT is not None:
            seen.append(look(attention_BATT))
    return model.classify(tokens_BTD), seen


def _run_norms(model: VisionTransformer, tokens_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and ``formulas.contribution_norms`` (B, T, T) of every block."""
    norms = []
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, (B, T, D) = block.attention, tokens_BTD.shape
        output_BTD, attention_BATT = block(tokens_BTD, model.rotation, keep_attention=True)
        values_BTD = attention.qkv(block.norm1(tokens_BTD))[:, :, 2 * D :]
        A = attention.n_attention_heads
        values_BTAK = values_BTD.reshape(B, T, A, D // A)
        projection_DD = attention.out_projection.weight
        if isinstance(block.scale1, LayerScale):
            projection_DD = block.scale1.weight[:, None] * projection_DD
        norms.append(
            formulas.contribution_norms(tokens_BTD, attention_BATT, values_BTAK, projection_DD)
        )
        tokens_BTD = output_BTD
    return model.classify(tokens_BTD), norms


def fitting(model: VisionTransformer) -> int:
    """Return for how many images one layer's attention fits ATTENTION_ENTRIES; at least 1."""
    config = model.config
    n_tokens = config.n_prefix_tokens + config.n_patches
    return max(1, ATTENTION_ENTRIES // (config.n_attention_heads * n_tokens**2))


def _in_chunks(
    model: VisionTransformer,
    chunk: int,
    compute: Callable[..., tuple[Tensor, ...]],
    *inputs_B: Tensor,
) -> tuple[Tensor, ...]:
    """Call ``compute`` on ``chunk`` images at a time, on the model's device; join the results.

    Inside, no gradient is recorded unless ``compute`` enables it. The results are ordinary CPU
    tensors: even in the caller's ``inference_mode`` they support autograd. Each is allocated up
    front: small results kept between large temporary tensors would fragment the memory.
    """
    device, total, done = next(model.parameters()).device, len(inputs_B[0]), 0
    joined: list[Tensor] = []
    with torch.inference_mode(False), torch.no_grad():
        for some in zip(*(tensor.split(chunk) for tensor in inputs_B), strict=True):
            results = compute(*(tensor.to(device) for tensor in some))
            joined = joined or [r.new_empty((total, *r.shape[1:]), device="cpu") for r in results]
            for whole, part in zip(joined, results, strict=True):
                whole[done : done + len(part)] = part
            done += len(some[0])
    return tuple(joined)


def _fuse(attention_BATT: Tensor, settings: MapSettings) -> Tensor:
    """Return the attention (B, T, T) of the selected heads, fused."""
    heads = pick("head", settings.heads, attention_BATT.shape[1])
    assert settings.fusion != "norm"
    return formulas.fuse_heads(attention_BATT[:, [head - 1 for head in heads]], settings.fusion)


def read_maps(model: VisionTransformer, flow_BxTT: Tensor, query: tuple[int, int] | None) -> Tensor:
    """Return ``formulas.read_query`` with the model's grid and class token: maps_BxGJ."""
    config = model.config
    return formulas.read_query(
        flow_BxTT,
        config.grid_GJ,
        class_token=config.has_class_token,
        query=query,
        mean_pool=config.pool == "mean",
    )


def _choose(logits_BY: Tensor, classes_B: Tensor) -> Tensor:
    """Return each image's class (B,), the predicted one where none is given."""
    return torch.where(classes_B == PREDICTED, logits_BY.argmax(dim=1), classes_B)
