"""All there is to see at once: every head, every query, every depth of a model."""

import torch
from torch import Tensor

from vitrail.explain.maps import HeadFusion, fuse_heads, read_every_query, rollout
from vitrail.explain.run_blocks import check_call, in_chunks, pick, read, walk
from vitrail.model import VisionTransformer


def attention_by_head(
    model: VisionTransformer,
    images_BCHW: Tensor,
    *,
    query: tuple[int, int] | None = None,
    chunk: int = 64,
) -> Tensor:
    """Return the attention of every layer and head, read as by ``read_query``: maps_BLAGJ.

    Raises:
        ConfigError: as ``compute_maps``.
    """
    check_call(model, images_BCHW, chunk=chunk, query=query)
    layers = pick("layer", None, model.config.n_layers)

    def look(attention_BATT: Tensor) -> Tensor:
        return read(model, attention_BATT, query)

    def compute(images_BCHW: Tensor) -> tuple[Tensor]:
        _, maps_L = walk(model, model.embed(images_BCHW), layers, look)
        return (torch.stack(maps_L, dim=1),)

    return in_chunks(model, chunk, compute, images_BCHW)[0]


def attention_by_query(
    model: VisionTransformer,
    images_BCHW: Tensor,
    *,
    layer: int | None,
    fusion: HeadFusion = "mean",
    chunk: int = 64,
) -> Tensor:
    """Return what every patch, row by row, takes from every patch: maps_BNGJ.

    ``layer``, from 1, takes that layer's fused attention; None the rollout through all of them.

    Raises:
        ConfigError: as ``compute_maps``.
    """
    check_call(model, images_BCHW, chunk=chunk)
    layers = pick("layer", None if layer is None else (layer,), model.config.n_layers)
    grid_GJ, class_token = model.config.grid_GJ, model.config.has_class_token

    def look(attention_BATT: Tensor) -> Tensor:
        return fuse_heads(attention_BATT, fusion)

    def compute(images_BCHW: Tensor) -> tuple[Tensor]:
        _, fused_L = walk(model, model.embed(images_BCHW), layers, look)
        flow_BTT = rollout(fused_L)[:, -1] if layer is None else fused_L[0]
        return (read_every_query(flow_BTT, grid_GJ, class_token=class_token),)

    return in_chunks(model, chunk, compute, images_BCHW)[0]


def early_logits(model: VisionTransformer, images_BCHW: Tensor, *, chunk: int = 64) -> Tensor:
    """Return what would be predicted if the network ended after block 1, 2, ... L: logits_BLY.

    The model's own last norm and head read the tokens that each block leaves.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Raises:
        ConfigError: as ``compute_maps``.
    """
    check_call(model, images_BCHW, chunk=chunk)

    def compute(images_BCHW: Tensor) -> tuple[Tensor]:
        tokens_BTD, logits_L = model.embed(images_BCHW), []
        for block in model.blocks:
            tokens_BTD, _ = block(tokens_BTD, model.rotation)
            logits_L.append(model.classify(tokens_BTD))
        return (torch.stack(logits_L, dim=1),)

    return in_chunks(model, chunk, compute, images_BCHW)[0]
