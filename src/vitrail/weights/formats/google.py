"""Google's published ``.npz`` files: kernels HWIO, linear kernels transposed, heads separate.

Source: https://github.com/google-research/vision_transformer, vit_jax/models_vit.py: LayerNorm
has epsilon 1e-6, and ``nn.gelu`` of Flax is the tanh approximation.
"""

import re
from typing import Any

import torch
from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.errors import CheckpointError
from vitrail.weights.formats.layout import (
    Found,
    Layout,
    Rule,
    State,
    count_layers,
    shape,
    single,
    square_image,
    square_patch,
    tokens,
)

STEM, POSITIONS = "embedding/kernel", "Transformer/posembed_input/pos_embedding"
PREFIX, OPTIMIZER = "opt/target/", "opt/state/"
"""Training checkpoints contain the weights and the optimizer's state."""


def _find(state: State, _: dict[str, Any], n_attention_heads: int | None) -> Found:
    """Read the model's settings off its shapes, in which the heads are a separate dimension."""
    notes = ["the class token's position is added to the class token"]
    plain = {key.removeprefix(PREFIX): t for key, t in state.items() if OPTIMIZER not in key}
    if len(plain) < len(state):
        notes.append(f"{OPTIMIZER}: ignored, the optimizer's state")
    height, width, n_channels, embed_dim = shape(plain, STEM, 4)
    patch_size = square_patch(height, width, STEM)
    block = "Transformer/encoderblock_0"
    heads = shape(plain, f"{block}/MultiHeadDotProductAttention_1/query/kernel", 3)[1]
    if n_attention_heads not in (None, heads):
        raise CheckpointError(f"it has {heads} attention heads, not {n_attention_heads}")
    hidden_dim = shape(plain, f"{block}/MlpBlock_3/Dense_0/kernel", 2)[1]
    config = ModelConfig(
        image_size=square_image(shape(plain, POSITIONS, 3)[1] - 1, patch_size, POSITIONS),
        n_channels=n_channels,
        n_classes=len(plain["head/bias"]) if "head/bias" in plain else 0,
        patch_size=patch_size,
        embed_dim=embed_dim,
        n_layers=count_layers(plain, r"Transformer/encoderblock_(\d+)/"),
        n_attention_heads=heads,
        forward_mul=hidden_dim / embed_dim,
        head="mlp" if "pre_logits/kernel" in plain else "linear",
        hidden_act="gelu_tanh",
        layer_norm_eps=1e-6,
    )
    return Found(config, plain, notes)


def _rules(config: ModelConfig) -> list[Rule]:
    """Return the layout's rules for one model."""
    table = [
        single(
            "stem.weight", STEM, lambda t: t.permute(3, 2, 0, 1), lambda t: (t.permute(2, 3, 1, 0),)
        ),
        _keep("stem.bias", "embedding/bias"),
        tokens("cls", POSITIONS),
        *_norm("norm", "Transformer/encoder_norm"),
    ]
    for index in range(config.n_layers):
        ours, theirs = f"blocks.{index}", f"Transformer/encoderblock_{index}"
        table += [
            *_norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0"),
            *_attention(
                f"{ours}.attention",
                f"{theirs}/MultiHeadDotProductAttention_1",
                config.n_attention_heads,
            ),
            *_norm(f"{ours}.norm2", f"{theirs}/LayerNorm_2"),
            *_linear(f"{ours}.mlp.fc1", f"{theirs}/MlpBlock_3/Dense_0"),
            *_linear(f"{ours}.mlp.fc2", f"{theirs}/MlpBlock_3/Dense_1"),
        ]
    if config.n_classes == 0:
        return table
    if config.head == "mlp":
        return [*table, *_linear("head.fc1", "pre_logits"), *_linear("head.fc2", "head")]
    return [*table, *_linear("head", "head")]


def _keep(ours: str, theirs: str) -> Rule:
    """Return the rule for a tensor that is equal on both sides."""
    return single(ours, theirs, lambda t: t, lambda t: (t,))


def _norm(ours: str, theirs: str) -> list[Rule]:
    """Return the rules for a LayerNorm."""
    return [_keep(f"{ours}.weight", f"{theirs}/scale"), _keep(f"{ours}.bias", f"{theirs}/bias")]


def _linear(ours: str, theirs: str) -> list[Rule]:
    """Return the rules for a linear layer, whose kernel is (in, out)."""
    kernel = single(f"{ours}.weight", f"{theirs}/kernel", lambda t: t.T, lambda t: (t.T,))
    return [kernel, _keep(f"{ours}.bias", f"{theirs}/bias")]


def _attention(ours: str, theirs: str, heads: int) -> list[Rule]:
    """Return the rules for attention: kernels (D, A, K) in, (A, K, D) out, biases (A, K)."""

    def split(weight_3DD: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.T.unflatten(1, (heads, -1)) for part in weight_3DD.chunk(3))

    names = [f"{theirs}/{name}" for name in ("query", "key", "value")]
    return [
        Rule(
            (f"{ours}.qkv.weight",),
            tuple(f"{name}/kernel" for name in names),
            lambda *kernels: (torch.cat([kernel_DAK.flatten(1).T for kernel_DAK in kernels]),),
            split,
        ),
        Rule(
            (f"{ours}.qkv.bias",),
            tuple(f"{name}/bias" for name in names),
            lambda *biases: (torch.cat([bias_AK.flatten() for bias_AK in biases]),),
            lambda bias_D: tuple(part.unflatten(0, (heads, -1)) for part in bias_D.chunk(3)),
        ),
        single(
            f"{ours}.out_projection.weight",
            f"{theirs}/out/kernel",
            lambda kernel_AKD: kernel_AKD.flatten(0, 1).T,
            lambda weight_DD: (weight_DD.T.unflatten(0, (heads, -1)),),
        ),
        _keep(f"{ours}.out_projection.bias", f"{theirs}/out/bias"),
    ]


GOOGLE = Layout(
    "google",
    re.compile(r"(opt/target/)?(embedding/|Transformer/|cls$)"),
    _find,
    _rules,
    {
        "pool": ("cls",),
        "hidden_act": ("gelu_tanh",),
        "layer_norm_eps": (1e-6,),
    },
)
