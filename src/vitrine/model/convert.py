"""Weights of other systems -> ours. So far: the reference system's ``.pt`` state dicts.

Reference key                                     ours
embedding.conv1                                   stem
embedding.pos_embedding (1, N, D)                 position_ND
embedding.cls_token (1, 1, D)                     class_token_D
encoder.L.norm1, norm2                            blocks.L.norm1, norm2
encoder.L.attention.queries, keys, values         blocks.L.attention.qkv (stacked in this order)
encoder.L.attention.out_projection                blocks.L.attention.out_projection
encoder.L.fc1, fc2                                blocks.L.mlp.fc1, fc2
norm                                              norm
classifier.fc1, fc2                               head.fc1, fc2
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vitrine.config import ModelConfig
from vitrine.errors import CheckpointError

REFERENCE_HEADS = 4
"""The reference's default head count, which its files do not tell."""


def is_reference(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict has the reference system's keys."""
    return "embedding.conv1.weight" in state and "encoder.0.attention.queries.weight" in state


def convert_reference(
    state: Mapping[str, Tensor], *, n_attention_heads: int | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Turn the reference system's state dict into our configuration and state dict.

    Layers, width, patch, image, channels, classes and hidden width are read off the shapes. The
    head count cannot be: it is 4 unless given.

    Raises:
        CheckpointError: keys are missing or left over, or shapes disagree.
        ConfigError: the head count does not divide the width.
    """
    config = read_reference_config(state, n_attention_heads or REFERENCE_HEADS)
    left = dict(state)
    converted: dict[str, Tensor] = {}

    def move(theirs: str, ours: str) -> None:
        for part in ("weight", "bias"):
            converted[f"{ours}.{part}"] = take(left, f"{theirs}.{part}")

    move("embedding.conv1", "stem")
    converted["position_ND"] = take(left, "embedding.pos_embedding").squeeze(0)
    converted["class_token_D"] = take(left, "embedding.cls_token").flatten()
    for index in range(config.n_layers):
        theirs, ours = f"encoder.{index}", f"blocks.{index}"
        for part in ("weight", "bias"):
            converted[f"{ours}.attention.qkv.{part}"] = torch.cat(
                [
                    take(left, f"{theirs}.attention.{name}.{part}")
                    for name in ("queries", "keys", "values")
                ]
            )
        move(f"{theirs}.attention.out_projection", f"{ours}.attention.out_projection")
        for name in ("norm1", "norm2"):
            move(f"{theirs}.{name}", f"{ours}.{name}")
        for name in ("fc1", "fc2"):
            move(f"{theirs}.{name}", f"{ours}.mlp.{name}")
    move("norm", "norm")
    move("classifier.fc1", "head.fc1")
    move("classifier.fc2", "head.fc2")
    if left:
        raise CheckpointError(
            f"not the reference system's weights: unknown keys {sorted(left)[:3]}"
        )
    return config, converted


def read_reference_config(state: Mapping[str, Tensor], n_attention_heads: int) -> ModelConfig:
    """Read the reference model's settings off its shapes."""
    left = dict(state)
    embed_dim, n_channels, patch_size, _ = shape(left, "embedding.conv1.weight", 4)
    _, n_patches, _ = shape(left, "embedding.pos_embedding", 3)
    hidden_dim, _ = shape(left, "encoder.0.fc1.weight", 2)
    layers = {key.split(".")[1] for key in state if key.startswith("encoder.")}
    n_classes, _ = shape(left, "classifier.fc2.weight", 2)
    side = math.isqrt(n_patches)
    if embed_dim * n_patches == 0:
        raise CheckpointError("not the reference system's weights: a tensor without numbers")
    if side * side != n_patches:
        raise CheckpointError(
            f"embedding.pos_embedding has {n_patches} patches: not a square image"
        )
    return ModelConfig(
        image_size=side * patch_size,
        n_channels=n_channels,
        n_classes=n_classes,
        patch_size=patch_size,
        embed_dim=embed_dim,
        n_layers=len(layers),
        n_attention_heads=n_attention_heads,
        forward_mul=hidden_dim / embed_dim,
    )


def take(state: dict[str, Tensor], key: str) -> Tensor:
    """Remove and return one tensor, or say that it is missing."""
    if key not in state:
        raise CheckpointError(f"not the reference system's weights: {key} is missing")
    return state.pop(key)


def shape(state: dict[str, Tensor], key: str, dimensions: int) -> torch.Size:
    """Return the shape of one tensor that must have so many dimensions."""
    tensor = take(state, key)
    if tensor.ndim != dimensions:
        raise CheckpointError(f"{key} has shape {tuple(tensor.shape)}, not {dimensions} dimensions")
    return tensor.shape
