"""Networks without classes on Hugging Face: DINOv2, DINOv3, the vision towers of CLIP and SigLIP.

Read only. Sources: https://github.com/huggingface/transformers, models/dinov2/modeling_dinov2.py,
models/dinov2_with_registers, models/dinov3_vit/modeling_dinov3_vit.py,
models/clip/modeling_clip.py and models/siglip/modeling_siglip.py.
"""

import re
from typing import Any

import torch
from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.errors import CheckpointError
from vitrail.weights.formats import (
    Converted,
    Layout,
    State,
    block_names,
    fill_bias,
    fill_biases,
    first_few,
    shape,
    square_image,
)
from vitrail.weights.formats.huggingface import (
    NEW_NAMES,
    PROCESSOR,
    made_size,
    read_classes,
    read_processor,
    read_settings,
)


def _image_size(plain: State, positions: str, patch_size: int, n_before: int) -> int:
    """Return the side of the square image that the table of positions is for."""
    return square_image(shape(plain, positions, 3)[1] - n_before, patch_size)


# --- DINOv2 ---------------------------------------------------------------------------------------

PREFIX = re.compile(r"^dinov2(_with_registers)?\.")
DINOV2_NAMES = {
    "stem": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
    "head": ("classifier",),
    **block_names(
        "encoder.layer.*.",
        {
            "norm1": ("norm1",),
            "attention.qkv": tuple(
                f"attention.attention.{name}" for name in ("query", "key", "value")
            ),
            "attention.out_projection": ("attention.output.dense",),
            "scale1.weight": ("layer_scale1.lambda1",),
            "norm2": ("norm2",),
            "mlp.fc1": ("mlp.fc1",),
            "mlp.fc2": ("mlp.fc2",),
            "scale2.weight": ("layer_scale2.lambda1",),
        },
    ),
}
DINOV2_RENAMED = {
    ".mlp.weights_in.": ".mlp.fc1.",
    ".mlp.weights_out.": ".mlp.fc2.",
    **{new: old for new, old in NEW_NAMES.items() if "_proj" in new},
}
MASK = "embeddings.mask_token"


def _find_dinov2(state: State, files: dict[str, Any], n_attention_heads: int | None) -> Converted:
    """Read the model's settings off its shapes, its config.json and preprocessor_config.json.

    A classifier reads the class token concatenated with the mean of the patches.
    """
    about = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, **files.get("config.json", {})}
    notes = ["the class token's position is added to the class token"]
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = PREFIX.sub("", key)
        for new, old in DINOV2_RENAMED.items():
            name = name.replace(new, old)
        plain[name] = tensor
    if plain.pop(MASK, None) is not None:
        notes.append(f"{MASK}: ignored, used in training only")
    fill_biases(plain, DINOV2_NAMES, notes)
    settings = read_settings(plain, DINOV2_NAMES, about, n_attention_heads, notes)
    registers = plain.get(DINOV2.registers)
    config = ModelConfig(
        image_size=_image_size(plain, DINOV2.positions, settings["patch_size"], 1),
        pool="cls_mean" if settings["n_classes"] else "cls",
        n_registers=0 if registers is None else registers.shape[1],
        **settings,
    )
    classes = read_classes(about, config.n_classes)
    processor = files.get(PROCESSOR, {})
    image_hw = made_size(processor, config.image_hw)
    data = read_processor(processor, image_hw, notes)
    # The published processors cut out 224 x 224 pixels, for which the positions are resized.
    return Converted(
        config, plain, notes, classes, data, IMAGENET, image_hw=image_hw,
        antialias=registers is not None,
    )  # fmt: skip


IMAGENET = {
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "fit": "crop",
    "interpolation": "bicubic",
}  # fmt: skip
DINOV2 = Layout(
    "dinov2",
    re.compile(
        r"(dinov2\w*\.)?encoder\.layer\.\d+\.(norm[12]|layer_scale[12]|mlp|attention)\.|dinov2"
    ),
    _find_dinov2,
    lambda _: DINOV2_NAMES,
    class_token="embeddings.cls_token",
    positions="embeddings.position_embeddings",
    registers="embeddings.register_tokens",
    needs={},
)

# --- DINOv3 ---------------------------------------------------------------------------------------

DINOV3_NAMES = {
    "stem": ("embeddings.patch_embeddings",),
    "norm": ("norm",),
    "head": ("classifier",),
    **block_names(
        "layer.*.",
        {
            "norm1": ("norm1",),
            "attention.qkv": tuple(f"attention.{name}_proj" for name in "qkv"),
            "attention.out_projection": ("attention.o_proj",),
            "scale1.weight": ("layer_scale1.lambda1",),
            "norm2": ("norm2",),
            "mlp.fc1": ("mlp.up_proj",),
            "mlp.fc2": ("mlp.down_proj",),
            "scale2.weight": ("layer_scale2.lambda1",),
        },
    ),
}
DINOV3_GATED_NAMES = DINOV3_NAMES | block_names(
    "layer.*.", {"mlp.fc1": ("mlp.gate_proj", "mlp.up_proj")}
)
ROTARY_BASE = 100.0
"""The base of our rotary positions, and of all published weights."""


def _find_dinov3(state: State, files: dict[str, Any], n_attention_heads: int | None) -> Converted:
    """Read the model's settings off its shapes, its config.json and preprocessor_config.json."""
    notes: list[str] = []
    plain = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    gated = "layer.0.mlp.gate_proj.weight" in plain
    about = {
        "hidden_act": "silu" if gated else "gelu", "layer_norm_eps": 1e-5, "image_size": 224,
        "rope_theta": ROTARY_BASE, **files.get("config.json", {}),
    }  # fmt: skip
    if float(about["rope_theta"]) != ROTARY_BASE:
        raise CheckpointError(
            f"rope_theta is {about['rope_theta']}: only {ROTARY_BASE:g} is supported"
        )
    if gated and about["hidden_act"] != "silu":
        raise CheckpointError(
            f"hidden_act is {about['hidden_act']!r} with a gate: only silu is supported"
        )
    if plain.pop(MASK, None) is not None:
        notes.append(f"{MASK}: ignored, used in training only")
    fill_biases(plain, DINOV3_NAMES, notes)
    act = {"hidden_act": "gelu"} if gated else {}
    settings = read_settings(plain, DINOV3_NAMES, about | act, n_attention_heads, notes)
    settings |= {"hidden_act": "swiglu"} if gated else {}
    size = about["image_size"]
    config = ModelConfig(
        image_size=size if isinstance(size, int) else (int(size[0]), int(size[1])),
        n_registers=plain[DINOV3.registers].shape[1] if DINOV3.registers in plain else 0,
        position="rope_centered",
        **settings,
    )
    data = read_processor(files.get(PROCESSOR, {}), config.image_hw, notes)
    return Converted(config, plain, notes, (), data, IMAGENET)


DINOV3 = Layout(
    "dinov3",
    re.compile(r"(model\.)?layer\.\d+\.|embeddings\.(cls|register)_token|norm\."),
    _find_dinov3,
    lambda config: DINOV3_GATED_NAMES if config.hidden_act == "swiglu" else DINOV3_NAMES,
    class_token="embeddings.cls_token",
    positions="",
    registers="embeddings.register_tokens",
    needs={},
)

# --- CLIP and SigLIP ------------------------------------------------------------------------------

TOWER = "vision_model."
CLIP_NAMES = {
    "stem": ("embeddings.patch_embedding",),
    "pre_norm": ("pre_layrnorm",),
    "norm": ("post_layernorm",),
    "head": ("classifier",),
    **block_names(
        "encoder.layers.*.",
        {
            "norm1": ("layer_norm1",),
            "attention.qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
            "attention.out_projection": ("self_attn.out_proj",),
            "norm2": ("layer_norm2",),
            "mlp.fc1": ("mlp.fc1",),
            "mlp.fc2": ("mlp.fc2",),
        },
    ),
}
UNUSED = re.compile(
    r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$"
    r"|(vision_model\.)?(embeddings\.position_ids$|head\.)"
)
"""The text tower, what joins the two, and SigLIP's pooling by attention."""


def _find_clip(state: State, files: dict[str, Any], n_attention_heads: int | None) -> Converted:
    """Read the vision tower's settings off its shapes and config.json.

    SigLIP has no class token and pools with an attention layer, which is not read: the pooled
    output is the mean of the patches instead.
    """
    notes: list[str] = []
    unused = [key for key in state if UNUSED.match(key)]
    if unused:
        notes.append(f"{first_few(unused)}: ignored, not part of the vision tower's blocks")
    plain = {key.removeprefix(TOWER): t for key, t in state.items() if not UNUSED.match(key)}
    is_clip = "embeddings.class_embedding" in plain
    act, eps = ("quick_gelu", 1e-5) if is_clip else ("gelu_pytorch_tanh", 1e-6)
    about = files.get("config.json", {})
    about = {"hidden_act": act, "layer_norm_eps": eps, **about.get("vision_config", about)}
    if is_clip:
        plain[CLIP.class_token] = plain[CLIP.class_token].view(1, 1, -1)
        notes.append("the class token's position is added to the class token")
    table = f"{CLIP.positions}.weight"
    plain[CLIP.positions] = plain.pop(table)[None] if table in plain else torch.empty(0)
    fill_bias(plain, CLIP_NAMES["stem"][0])
    settings = read_settings(plain, CLIP_NAMES, about, n_attention_heads, notes)
    config = ModelConfig(
        image_size=_image_size(plain, CLIP.positions, settings["patch_size"], is_clip),
        pool="cls" if is_clip else "mean",
        pre_norm="pre_layrnorm.weight" in plain,
        **settings,
    )
    data = read_processor(files.get(PROCESSOR, {}), config.image_hw, notes)
    return Converted(config, plain, notes, (), data)


CLIP = Layout(
    "clip",
    re.compile(
        r"(vision_model\.)?(embeddings\.(class|patch|position)_embedding\b|encoder\.layers\.\d+\."
        r"|p(re_layrnorm|ost_layernorm)\.)"
    ),
    _find_clip,
    lambda _: CLIP_NAMES,
    class_token="embeddings.class_embedding",
    positions="embeddings.position_embedding",
    needs={},
)
