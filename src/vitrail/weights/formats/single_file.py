"""Layouts of single files without settings: the reference's ``.pt`` and Google's ``.npz``.

The reference has separate layers for queries, keys and values, and an MLP head. Google's kernels
are HWIO, linear kernels transposed, heads a separate dimension.
Source: https://github.com/google-research/vision_transformer, vit_jax/models_vit.py: LayerNorm
has epsilon 1e-6, and ``nn.gelu`` of Flax is the tanh approximation.
"""

import re
from typing import Any

from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.data.cifar import CIFAR10_CLASSES
from vitrail.errors import CheckpointError
from vitrail.weights.formats import (
    Converted,
    Layout,
    State,
    block_names,
    read_shapes,
    shape,
    square_image,
)

# --- the reference --------------------------------------------------------------------------------

HEADS = 4
"""The reference's default head count, which its files do not contain."""
DATA_SETTINGS = {
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "fit": "squash", "interpolation": "bilinear",
    "crop_pct": 1.0,
}  # fmt: skip
"""How its code prepares pictures."""
REFERENCE_NAMES = {
    "stem": ("embedding.conv1",),
    "norm": ("norm",),
    "head.fc1": ("classifier.fc1",),
    "head.fc2": ("classifier.fc2",),
    **block_names(
        "encoder.*.",
        {
            "norm1": ("norm1",),
            "attention.qkv": ("attention.queries", "attention.keys", "attention.values"),
            "attention.out_projection": ("attention.out_projection",),
            "norm2": ("norm2",),
            "mlp.fc1": ("fc1",),
            "mlp.fc2": ("fc2",),
        },
    ),
}


def _find_reference(state: State, _: dict[str, Any], n_attention_heads: int | None) -> Converted:
    """Read the model's settings off its shapes."""
    shapes = read_shapes(state, REFERENCE_NAMES)
    n_patches = shape(state, REFERENCE.positions, 3)[1]
    config = ModelConfig(
        image_size=square_image(n_patches, shapes["patch_size"]),
        n_attention_heads=n_attention_heads or HEADS,
        **shapes,
    )
    notes = [] if n_attention_heads else [f"assumed n_attention_heads {HEADS}: not in the file"]
    return Converted(config, state, notes, CIFAR10_CLASSES, DATA_SETTINGS)


REFERENCE = Layout(
    "reference",
    re.compile(r"embedding\.conv1\.|encoder\.\d+\.attention\.(queries|keys|values)\."),
    _find_reference,
    lambda _: REFERENCE_NAMES,
    class_token="embedding.cls_token",
    positions="embedding.pos_embedding",
    class_row=False,
    needs={"pool": ("cls",), "head": ("mlp",), "hidden_act": ("gelu",), "layer_norm_eps": (1e-5,)},
)

# --- Google ---------------------------------------------------------------------------------------

PREFIX, OPTIMIZER = "opt/target/", "opt/state/"
"""Training checkpoints contain the weights and the optimizer's state."""
SPLIT = ("/query", "/key", "/value")
GOOGLE_NAMES = {
    "stem": ("embedding",),
    "norm": ("Transformer/encoder_norm",),
    "head": ("head",),
    "head.fc1": ("pre_logits",),
    "head.fc2": ("head",),
    **block_names(
        "Transformer/encoderblock_*/",
        {
            "norm1": ("LayerNorm_0",),
            "attention.qkv": tuple(f"MultiHeadDotProductAttention_1{name}" for name in SPLIT),
            "attention.out_projection": ("MultiHeadDotProductAttention_1/out",),
            "norm2": ("LayerNorm_2",),
            "mlp.fc1": ("MlpBlock_3/Dense_0",),
            "mlp.fc2": ("MlpBlock_3/Dense_1",),
        },
    ),
}


def _find_google(state: State, _: dict[str, Any], n_attention_heads: int | None) -> Converted:
    """Read the model's settings off its shapes, which also show the number of heads."""
    notes = ["the class token's position is added to the class token"]
    weights = {key.removeprefix(PREFIX): t for key, t in state.items() if OPTIMIZER not in key}
    if len(weights) < len(state):
        notes.append(f"{OPTIMIZER}: ignored, the optimizer's state")
    query = GOOGLE_NAMES["blocks.*.attention.qkv"][0].replace("*", "0")
    heads = shape(weights, f"{query}/kernel", 3)[1]
    if n_attention_heads not in (None, heads):
        raise CheckpointError(f"it has {heads} attention heads, not {n_attention_heads}")
    mlp = GOOGLE_NAMES["blocks.*.mlp.fc1"][0].replace("*", "0")
    for layer, dimensions in (("embedding", 4), (mlp, 2)):  # so that errors have Google's names
        shape(weights, f"{layer}/kernel", dimensions)
    shapes = read_shapes(_unpack_google(weights), GOOGLE_NAMES)
    n_patches = shape(weights, GOOGLE.positions, 3)[1] - 1
    config = ModelConfig(
        image_size=square_image(n_patches, shapes["patch_size"]),
        n_attention_heads=heads,
        head="mlp" if "pre_logits/kernel" in weights else "linear",
        hidden_act="gelu_tanh",
        layer_norm_eps=1e-6,
        **shapes,
    )
    return Converted(config, weights, notes)


def _unpack_google(state: State) -> dict[str, Tensor]:
    """Return the tensors with PyTorch's parameter names and dimension order, and joined heads."""
    plain = {}
    for key, tensor in state.items():
        layer, _, part = key.rpartition("/")
        if part == "kernel" and tensor.ndim == 4:
            plain[f"{layer}.weight"] = tensor.permute(3, 2, 0, 1)
        elif part == "kernel" and tensor.ndim > 1:
            joined = tensor.flatten(0, 1) if layer.endswith("/out") else tensor.flatten(1)
            plain[f"{layer}.weight"] = joined.T
        elif part in ("scale", "bias"):
            plain[f"{layer}.{'weight' if part == 'scale' else part}"] = tensor.flatten()
        else:
            plain[key] = tensor
    return plain


def _pack_google(plain: State, config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors as Google has them: the reverse of ``_unpack_google``."""
    heads, state = (config.n_attention_heads, -1), {}
    for key, tensor in plain.items():
        layer, _, part = key.rpartition(".")
        name = f"{layer}/bias" if part == "bias" else f"{layer}/kernel"
        if not layer:
            name = key
        elif part == "weight" and tensor.ndim == 1:
            name = f"{layer}/scale"
        elif tensor.ndim == 4:
            tensor = tensor.permute(2, 3, 1, 0)
        elif tensor.ndim == 2:
            tensor = tensor.T
        if layer.endswith(SPLIT):
            tensor = tensor.unflatten(-1, heads)
        elif layer.endswith("/out") and part == "weight":
            tensor = tensor.unflatten(0, heads)
        state[name] = tensor
    return state


GOOGLE = Layout(
    "google",
    re.compile(r"(opt/target/)?(embedding/|Transformer/|cls$)"),
    _find_google,
    lambda _: GOOGLE_NAMES,
    class_token="cls",
    positions="Transformer/posembed_input/pos_embedding",
    needs={"pool": ("cls",), "hidden_act": ("gelu_tanh",), "layer_norm_eps": (1e-6,)},
    pack=_pack_google,
    unpack=_unpack_google,
)
