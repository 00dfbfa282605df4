"""A model and images -> maps of what the model looked at.

The maps are on the CPU and not normalised. The model is neither changed nor hooked: any number of
threads may explain with one model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.explain import maps
from vitrail.explain.all_heads import attention_by_head, attention_by_query, early_logits
from vitrail.explain.run_blocks import (
    check_call,
    check_classes,
    in_chunks,
    pick,
    read,
    require_finite,
    walk,
)
from vitrail.explain.settings import METHODS, SERVED, MapSettings, Method
from vitrail.model import VisionTransformer

__all__ = [
    "METHODS",
    "MapSettings",
    "Maps",
    "Method",
    "attention_by_head",
    "attention_by_query",
    "compute_maps",
    "early_logits",
]

PREDICTED = -1
"""Stands for the class that the model predicts."""


@dataclass(frozen=True)
class Maps:
    """Maps of some images, on the CPU, float32, not normalised.

    Shapes:
        values_BLGJ; logits_BY; classes_B, the class that each image's maps explain.
    """

    values_BLGJ: Tensor
    layers: tuple[int, ...]
    """What each L is, ascending, from 1; (0,) for a method that has no layers."""
    logits_BY: Tensor
    classes_B: Tensor


class Explained(NamedTuple):
    """What a method makes of one chunk of images: the tensors of ``Maps``."""

    values_BLGJ: Tensor
    logits_BY: Tensor
    classes_B: Tensor


def compute_maps(
    model: VisionTransformer,
    images_BCHW: Tensor,
    settings: MapSettings,
    *,
    classes_B: Tensor | None = None,
) -> Maps:
    """Return the maps of each image, for the class given or else the one predicted.

    ``attention`` and ``rollout`` are the same for every class. No image's maps depend on the
    other images.

    Raises:
        ConfigError: a layer, head, query or class is not there, the images are not of the model's
            shape, or the model is in training mode.
        CheckpointError: the model's output is not finite.
    """
    check_call(model, images_BCHW, chunk=settings.chunk, query=settings.query)
    layers = pick("layer", settings.layers, model.config.n_layers)
    pick("head", settings.heads, model.config.n_attention_heads)
    if classes_B is None:
        classes_B = torch.full((len(images_BCHW),), PREDICTED)
    else:
        check_classes(classes_B, len(images_BCHW), model.config.n_classes)

    def compute(images_BCHW: Tensor, classes_B: Tensor) -> Explained:
        return COMPUTE[settings.method](model, images_BCHW, classes_B, settings)

    joined = in_chunks(model, settings.chunk, compute, images_BCHW, classes_B.long())
    values_BLGJ, logits_BY, chosen_B = joined
    require_finite(values_BLGJ, logits_BY)
    has_layers = "layers" in SERVED[settings.method]
    return Maps(values_BLGJ.float(), layers if has_layers else (0,), logits_BY.float(), chosen_B)


# The methods, each for one chunk of images.


def attention_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> Explained:
    """Return the attention of single layers: softmax(Q K^T / sqrt(K)), heads fused.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """

    def look(attention_BATT: Tensor) -> Tensor:
        return read(model, fuse(attention_BATT, settings), settings.query)

    layers = pick("layer", settings.layers, model.config.n_layers)
    logits_BY, maps_L = walk(model, model.embed(images_BCHW), layers, look)
    return Explained(torch.stack(maps_L, dim=1), logits_BY, choose(logits_BY, classes_B))


def rollout_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> Explained:
    """Return attention rollout; formula and source: ``maps.rollout``."""

    def look(attention_BATT: Tensor) -> Tensor:
        return maps.discard_lowest(
            fuse(attention_BATT, settings),
            settings.discard_ratio,
            class_token=model.config.has_class_token,
        )

    layers = pick("layer", settings.layers, model.config.n_layers)
    logits_BY, fused_L = walk(model, model.embed(images_BCHW), up_to(layers), look)
    values_BLGJ = read_truncations(model, maps.rollout(fused_L), layers, settings)
    return Explained(values_BLGJ, logits_BY, choose(logits_BY, classes_B))


def gradient_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> Explained:
    """Return gradient rollout or relevance; formulas and sources: ``maps`` has them.

    The gradient is that of the class's logit. The sum over a chunk has each image's own gradient,
    as no image's logits depend on another image.
    """
    layers = pick("layer", settings.layers, model.config.n_layers)
    tokens_BTD = model.embed(images_BCHW)
    with torch.enable_grad():
        # Tokens that ask for a gradient get one even in a model whose weights are frozen.
        tokens_BTD = tokens_BTD.detach().requires_grad_()
        logits_BY, attentions_L = walk(model, tokens_BTD, up_to(layers), lambda a_BATT: a_BATT)
        chosen_B = choose(logits_BY, classes_B)
        gradients_L = torch.autograd.grad(take(logits_BY, chosen_B).sum(), attentions_L)
    attentions_L = [attention_BATT.detach() for attention_BATT in attentions_L]
    if settings.method == "relevance":
        flow_BLTT = maps.relevance(attentions_L, gradients_L)
    else:
        flow_BLTT = maps.gradient_rollout(
            attentions_L,
            gradients_L,
            discard_ratio=settings.discard_ratio,
            class_token=model.config.has_class_token,
        )
    values_BLGJ = read_truncations(model, flow_BLTT, layers, settings)
    return Explained(values_BLGJ, logits_BY.detach(), chosen_B)


def gradcam_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, _: MapSettings
) -> Explained:
    """Return Grad-CAM of the tokens that the last block reads: ``(sum_d w_d tokens_nd)+``.

    ``w_d`` is the gradient of the class's logit by the tokens, averaged over the patches. The
    tokens are the last block's input, before its norm: after it a class token no longer reads the
    patches, so they have no gradient; and its norm's output would leave out the residual branch,
    by which mean pooling reads them.

    Source: Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2.
    """
    *blocks, last = model.blocks
    tokens_BTD = model.embed(images_BCHW)
    for block in blocks:
        tokens_BTD, _ = block(tokens_BTD, model.rotation)
    with torch.enable_grad():
        tokens_BTD = tokens_BTD.detach().requires_grad_()
        logits_BY = model.classify(last(tokens_BTD, model.rotation)[0])
        chosen_B = choose(logits_BY, classes_B)
        (gradient_BTD,) = torch.autograd.grad(take(logits_BY, chosen_B).sum(), tokens_BTD)
    first = int(model.config.has_class_token)
    weights_B1D = gradient_BTD[:, first:].mean(dim=1, keepdim=True)
    map_BN = (weights_B1D * tokens_BTD.detach()[:, first:]).sum(dim=2).relu()
    values_B1GJ = map_BN.view(-1, 1, *model.config.grid_GJ)
    return Explained(values_B1GJ, logits_BY.detach(), chosen_B)


def occlusion_maps(
    model: VisionTransformer, images_BCHW: Tensor, classes_B: Tensor, settings: MapSettings
) -> Explained:
    """Return how much the class's probability drops when a patch is hidden.

    ``p(class | image) - p(class | image with the patch painted in the image's mean colour)``;
    below 0 where hiding the patch helps.

    Source: Zeiler & Fergus 2014, arXiv:1311.2901, section 4.2.
    """
    (G, J), P = model.config.grid_GJ, model.config.patch_size
    B, N, device = len(images_BCHW), G * J, images_BCHW.device
    logits_BY = model(images_BCHW)
    chosen_B = choose(logits_BY, classes_B)
    colours_BC11 = images_BCHW.mean(dim=(2, 3), keepdim=True)
    patches_NGJ = torch.eye(N, dtype=torch.bool, device=device).view(N, G, J)
    hidden_N1HW = patches_NGJ.repeat_interleave(P, 1).repeat_interleave(P, 2).unsqueeze(1)

    left = []
    for pairs_X in torch.arange(B * N, device=device).split(settings.chunk):
        image_X, patch_X = pairs_X // N, pairs_X % N
        images_XCHW = torch.where(hidden_N1HW[patch_X], colours_BC11[image_X], images_BCHW[image_X])
        left.append(take(model(images_XCHW).softmax(dim=1), chosen_B[image_X]))
    before_B1 = take(logits_BY.softmax(dim=1), chosen_B)[:, None]
    values_B1GJ = (before_B1 - torch.cat(left).view(B, N)).view(B, 1, G, J)
    return Explained(values_B1GJ, logits_BY, chosen_B)


COMPUTE: dict[Method, Callable[[VisionTransformer, Tensor, Tensor, MapSettings], Explained]] = {
    "attention": attention_maps,
    "rollout": rollout_maps,
    "gradient_rollout": gradient_maps,
    "relevance": gradient_maps,
    "gradcam": gradcam_maps,
    "occlusion": occlusion_maps,
}


def fuse(attention_BATT: Tensor, settings: MapSettings) -> Tensor:
    """Return the attention (B, T, T) of the heads asked for, fused."""
    heads = pick("head", settings.heads, attention_BATT.shape[1])
    return maps.fuse_heads(attention_BATT[:, [head - 1 for head in heads]], settings.fusion)


def up_to(layers: tuple[int, ...]) -> range:
    """Return every layer from the first to the last one asked for: what accumulates needs all."""
    return range(1, layers[-1] + 1)


def read_truncations(
    model: VisionTransformer, flow_BLTT: Tensor, layers: tuple[int, ...], settings: MapSettings
) -> Tensor:
    """Return the maps (B, L, G, J) of a flow after each of the layers asked for."""
    return read(model, flow_BLTT[:, [layer - 1 for layer in layers]], settings.query)


def choose(logits_BY: Tensor, classes_B: Tensor) -> Tensor:
    """Return each image's class (B,), the most probable one where none is named."""
    return torch.where(classes_B == PREDICTED, logits_BY.argmax(dim=1), classes_B)


def take(values_BY: Tensor, classes_B: Tensor) -> Tensor:
    """Return each image's value for its class (B,)."""
    return values_BY.gather(1, classes_B[:, None]).squeeze(1)
