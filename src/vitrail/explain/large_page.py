"""What the page of a large network stores: the layers that fit, at one byte per number.

The attention of all tokens to all tokens is too large for a page if there are hundreds of tokens.
Queries and keys, from which it is computed, are not. The page computes rows on demand.
"""

import base64
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.model.layers import rotate
from vitrail.model.vit import Block, VisionTransformer

ROOM = 3_500_000
"""Maximum bytes of attention and similarity in a page, in base64; keeps a page under 5 MB."""


@dataclass(frozen=True)
class LayerDetail:
    """What a page needs to compute a layer's attention and similarity for single patches.

    Shapes:
        queries_ATK and keys_ATK, whose products are the attention logits up to a constant per
        query; totals_AT, the log-sum-exp of these products; tokens_ND, after the layer.
    """

    layer: int
    queries_ATK: np.ndarray
    keys_ATK: np.ndarray
    totals_AT: np.ndarray
    tokens_ND: np.ndarray


def is_large(config: ModelConfig) -> bool:
    """Return whether the attention of every layer and head, and all cosines, exceed ROOM."""
    N = config.n_patches
    T, L, A = N + config.n_prefix_tokens, config.n_layers, config.n_attention_heads
    return _in_base64(L * A * T**2 + 2 * L * N**2) > ROOM


def choose_layers(config: ModelConfig) -> tuple[int, ...]:
    """Return as many layers as fit, evenly spaced, always including the last."""
    N, L = config.n_patches, config.n_layers
    T, D, A = N + config.n_prefix_tokens, config.embed_dim, config.n_attention_heads
    size = _in_base64(2 * T * D + 3 * 4 * A * T + N * D)
    count = min(L, max(1, ROOM // size))
    return tuple(sorted({L - number * L // count for number in range(count)}))


def _in_base64(n_bytes: int) -> int:
    return n_bytes * 4 // 3


def read_layers(
    model: VisionTransformer, image_1CHW: Tensor, layers: Container[int]
) -> tuple[np.ndarray, tuple[LayerDetail, ...]]:
    """Return what the classifier reads in every layer and head (L, A, T), and layers' details.

    Only one layer's attention is in memory at a time.
    """
    config, rows, details = model.config, [], []
    every_layer = range(1, config.n_layers + 1)
    with torch.inference_mode():
        tokens_1TD = model.embed(image_1CHW)
        for layer, output_1TD, attention_1ATT in model.run_blocks(
            tokens_1TD, keep_attention=every_layer
        ):
            assert attention_1ATT is not None
            if config.pool == "mean" or not config.has_class_token:
                rows.append(attention_1ATT[0, :, config.n_prefix_tokens :].mean(dim=1).cpu())
            else:
                rows.append(attention_1ATT[0, :, 0].cpu())
            if layer in layers:
                block = model.blocks[layer - 1]
                assert isinstance(block, Block)
                details.append(_read_detail(model, layer, block, tokens_1TD, output_1TD))
            tokens_1TD = output_1TD
    return torch.stack(rows).numpy(), tuple(details)


def _read_detail(
    model: VisionTransformer, layer: int, block: Block, tokens_1TD: Tensor, output_1TD: Tensor
) -> LayerDetail:
    """Return a layer's queries and keys, prepared for rounding to bytes, and its output."""
    A, T = model.config.n_attention_heads, tokens_1TD.shape[1]
    qkv_T3AK = block.attention.qkv(block.norm1(tokens_1TD)).float().view(T, 3, A, -1)
    q_ATK, k_ATK = qkv_T3AK[:, 0].transpose(0, 1), qkv_T3AK[:, 1].transpose(0, 1)
    if model.rotation is not None:
        q_ATK, k_ATK = rotate(q_ATK, model.rotation), rotate(k_ATK, model.rotation)
    q_ATK = q_ATK * q_ATK.shape[-1] ** -0.5
    # Subtracting one vector from all keys does not change the attention; numbers become smaller.
    k_ATK = k_ATK - k_ATK.mean(dim=1, keepdim=True)
    largest_q, largest_k = (x.abs().amax(dim=1, keepdim=True) for x in (q_ATK, k_ATK))
    ratio_A1K = (largest_k.clamp(min=1e-12) / largest_q.clamp(min=1e-12)).sqrt()
    q_ATK, k_ATK = q_ATK * ratio_A1K, k_ATK / ratio_A1K
    totals_AT = torch.logsumexp(q_ATK @ k_ATK.mT, dim=-1)
    patches_ND = output_1TD[0, model.config.n_prefix_tokens :].float()
    found = (x.cpu().numpy() for x in (q_ATK, k_ATK, totals_AT, patches_ND))
    return LayerDetail(layer, *found)


def encode_detail(detail: LayerDetail) -> dict[str, Any]:
    """Return the layer as JSON values: vectors in bytes, each with its scale."""
    queries, query_scales = _to_bytes(detail.queries_ATK)
    keys, key_scales = _to_bytes(detail.keys_ATK)
    return {
        "layer": detail.layer,
        "queries": encode_bytes(queries),
        "queryScales": encode_bytes(query_scales),
        "keys": encode_bytes(keys),
        "keyScales": encode_bytes(key_scales),
        "totals": encode_bytes(detail.totals_AT.astype("<f4")),
        "tokens": encode_bytes(_to_bytes(detail.tokens_ND)[0]),
    }


def _to_bytes(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors along the last axis as whole numbers from -127 to 127, and their scales."""
    scales = np.abs(vectors).max(axis=-1, keepdims=True) / 127
    scales = np.where(scales > 0, scales, 1)
    return np.rint(vectors / scales).astype(np.int8), scales.astype("<f4")


def encode_bytes(array: np.ndarray) -> str:
    """Return an array's bytes in base64."""
    return base64.b64encode(array.tobytes()).decode()
