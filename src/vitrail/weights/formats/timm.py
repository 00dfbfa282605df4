"""timm's VisionTransformer: one layer for queries, keys and values, as in ours.

Source: Wightman, https://github.com/huggingface/pytorch-image-models,
timm/models/vision_transformer.py and deit.py. Also read: tokens without a position
(``no_embed_class``), layers without qkv biases, registers, SwiGLU, a norm before the blocks, DeiT's
distillation token, and the names of DINOv2's own code, https://github.com/facebookresearch/dinov2.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from vitrail.config.settings import DataConfig, ModelConfig
from vitrail.errors import CheckpointError, ConfigError
from vitrail.weights.formats import (
    Converted,
    Files,
    Layout,
    Names,
    State,
    block_names,
    channel_values,
    choose_heads,
    fill_bias,
    fill_biases,
    merge_heads,
    read_shapes,
    rgb_values,
    shape,
    square_image,
)
from vitrail.weights.formats.huggingface import FILTERS

CLASS, REGISTERS, POSITIONS = "cls_token", "reg_token", "pos_embed"
DINOV2_NAMES = {"register_tokens": REGISTERS, ".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
ACTS = ("gelu", "gelu_tanh", "quick_gelu")
MODES = {"center": "crop", "squash": "squash"}
"""timm's crop_mode -> our fit; its third mode, border, pads with the mean color, not black."""
TIMM_DEFAULTS = {
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "fit": "crop",
    "interpolation": "bicubic", "crop_pct": 0.875,
}  # fmt: skip
"""timm's defaults for what config.json does not specify (timm/data/config.py)."""
NAMES = {
    "stem": ("patch_embed.proj",),
    "pre_norm": ("norm_pre",),
    "norm": ("norm",),
    "head": ("head",),
    **block_names(
        "blocks.*.",
        {
            "norm1": ("norm1",),
            "attention.qkv": ("attn.qkv",),
            "attention.out_projection": ("attn.proj",),
            "scale1.weight": ("ls1.gamma",),
            "norm2": ("norm2",),
            "mlp.fc1": ("mlp.fc1",),
            "mlp.fc2": ("mlp.fc2",),
            "scale2.weight": ("ls2.gamma",),
        },
    ),
}


def _find(state: State, files: dict[str, Any], n_attention_heads: int | None) -> Converted:
    """Read the model's settings off its shapes and, if there is one, timm's config.json."""
    about = files.get("config.json", {})
    args, pretrained = about.get("model_args", {}), about.get("pretrained_cfg") or about
    notes: list[str] = []
    state = _rename(state, notes)
    patch_size, size = read_shapes(state, NAMES)["patch_size"], _configured_size(args, pretrained)
    configured_patches = size and math.prod(side // patch_size for side in size)
    plain = _standard_form(state, configured_patches, notes)
    merged = merge_heads(plain, ("head", "head_dist"), "head", notes)
    shapes = read_shapes(plain, NAMES)
    n_patches = shape(plain, POSITIONS, 3)[1] - (CLASS in plain)
    if not size or configured_patches != n_patches:
        size = (square_image(n_patches, patch_size),) * 2
    architecture = about.get("architecture", "")
    act = args.get("act_layer", "quick_gelu" if "quickgelu" in architecture else "gelu")
    if act not in ACTS and "hidden_act" not in shapes:
        raise CheckpointError(f"act_layer is {act!r}: not one of {', '.join(ACTS)}")
    stored = args.get("num_heads")
    config = ModelConfig(
        image_size=size[0] if size[0] == size[1] else size,
        n_attention_heads=choose_heads(shapes["embed_dim"], n_attention_heads, stored, notes),
        n_registers=plain[REGISTERS].shape[1] if REGISTERS in plain else 0,
        pre_norm="norm_pre.weight" in plain,
        head="linear",
        layer_norm_eps=1e-5 if "clip" in architecture else 1e-6,
        **{"hidden_act": act, **shapes},
        **({"pool": "cls_register"} if merged else _pooling(plain, args)),
    )
    data, refused = _preparation(pretrained, config.image_hw)
    names = about.get("label_names", pretrained.get("label_names"))
    classes = tuple(map(str, names)) if isinstance(names, list) else ()
    return Converted(config, plain, notes, classes, data, TIMM_DEFAULTS if about else {}, refused)


def _preparation(
    pretrained: dict[str, Any], image_hw: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields of DataConfig that config.json specifies, and unsupported values.

    timm resizes to whole pixels first, ``floor(side / crop_pct)``, and then crops the center.
    """
    data: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name in ("mean", "std"):
        if pretrained.get(name):
            data[name] = rgb_values(pretrained[name], name)
    for ours, theirs, known in (
        ("fit", "crop_mode", MODES),
        ("interpolation", "interpolation", {name: name for name in FILTERS}),
    ):
        if value := pretrained.get(theirs):
            if value in known:
                data[ours] = known[value]
            else:
                refused[ours] = f"{theirs} {value!r:.40}"
    if share := pretrained.get("crop_pct"):
        data["crop_pct"] = image_hw[0] / math.floor(image_hw[0] / share)
    return data, refused


def _rename(state: State, notes: list[str]) -> dict[str, Tensor]:
    """Rename tensors of DINOv2's own code to timm's names, without what only training uses."""
    plain = {}
    for key, tensor in state.items():
        for old, new in DINOV2_NAMES.items():
            key = key.replace(old, new)
        plain[key] = tensor
    if plain.pop("mask_token", None) is not None:
        notes.append("mask_token: ignored, used in training only")
    return plain


def _standard_form(
    state: dict[str, Tensor], n_patches: int | None, notes: list[str]
) -> dict[str, Tensor]:
    """Convert variants to timm's standard form, with notes; the model computes the same.

    ``n_patches`` follows from config.json; without it the image is assumed to be square.
    """
    fill_biases(state, NAMES, notes)
    if "norm_pre.weight" in state:
        fill_bias(state, "patch_embed.proj")
    extra = [state.pop(name) for name in ("dist_token", REGISTERS) if name in state]
    if extra and all(tensor.ndim == 3 for tensor in extra):
        state[REGISTERS] = torch.cat(extra, dim=1)
    if state.get(POSITIONS, torch.empty(0)).ndim == 3:
        _place(state, n_patches, notes)
    return state


def _place(state: dict[str, Tensor], n_patches: int | None, notes: list[str]) -> None:
    """Give the class token a position, and the registers none: where they have one, it is added."""
    table_1TD, has_class = state[POSITIONS], int(CLASS in state)
    registers_1RD = state.get(REGISTERS, table_1TD[:, :0])
    rows, before = table_1TD.shape[1], has_class + registers_1RD.shape[1]
    for placed in (0, before, has_class):  # the tokens before the patches that have a position
        if rows - placed == (n_patches or math.isqrt(max(0, rows - placed)) ** 2):
            break
    class_row, register_rows = table_1TD[:, :has_class], table_1TD[:, has_class:placed]
    if placed < has_class:  # the class token has no position
        class_row = torch.zeros_like(class_row)
    elif has_class:
        notes.append("the class token's position is added to the class token")
    if register_rows.shape[1]:
        state[REGISTERS] = registers_1RD + register_rows
    state[POSITIONS] = torch.cat([class_row, table_1TD[:, placed:]], dim=1)


def _configured_size(args: dict[str, Any], pretrained: dict[str, Any]) -> tuple[int, int] | None:
    """Return the image size in config.json, if it has one."""
    size = args.get("img_size") or list(pretrained.get("input_size", ()))[1:]
    hw = (size, size) if isinstance(size, int) else tuple(size)
    return (hw[0], hw[1]) if len(hw) == 2 else None


def _pooling(state: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Any]:
    """Return pool, class_token and fc_norm.

    Without config.json, timm's defaults hold: the mean is normalized by ``fc_norm``, a class token
    by ``norm``.
    """
    has_class = CLASS in state
    fc_norm = "fc_norm.weight" in state
    pool = args.get("global_pool", "avg" if fc_norm or not has_class else "token")
    if pool not in ("avg", "token"):
        raise CheckpointError(f"global_pool is {pool!r}: not token or avg")
    if pool == "token":
        return {"pool": "cls"}
    return {"pool": "mean", "class_token": has_class, "fc_norm": fc_norm}


def _ratio(part: int, whole: int) -> float:
    """Return part / whole such that timm, which rounds ``ratio * whole`` down, gets the part."""
    exact = part / whole
    return exact if int(exact * whole) == part else math.nextafter(exact, math.inf)


def _share(part: int, whole: int) -> float:
    """Return part / whole such that timm, which rounds ``part / share`` down, gets the whole."""
    exact = part / whole
    return exact if int(part / exact) == whole else math.nextafter(exact, 0)


def _names(config: ModelConfig) -> Names:
    """Return the names of the layers, which depend on where the mean is normalized."""
    return NAMES | {"norm": ("fc_norm",)} if config.fc_norm else NAMES


def _describe(config: ModelConfig, data: DataConfig, classes: tuple[str, ...]) -> Files:
    """Return the config.json from which ``timm.create_model("local-dir:FOLDER")`` builds it.

    The only way to set timm's LayerNorm epsilon is the name of an architecture that has it.
    """
    args = {
        "img_size": list(config.image_hw),
        "patch_size": config.patch_size,
        "in_chans": config.n_channels,
        "embed_dim": config.embed_dim,
        "depth": config.n_layers,
        "num_heads": config.n_attention_heads,
        "mlp_ratio": _ratio(config.hidden_dim, config.embed_dim),
        "class_token": config.has_class_token,
        "global_pool": "token" if config.pool == "cls" else "avg",
        "fc_norm": config.fc_norm,
        "pre_norm": False,
        "act_layer": config.hidden_act,
    }
    if data.fit not in MODES.values():
        raise ConfigError(
            f"timm does not support fit {data.fit}: choose another, e.g. --fit squash"
        )
    eps = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}
    about = {
        "architecture": eps[config.layer_norm_eps],
        "num_classes": config.n_classes,
        "num_features": config.embed_dim,
        "label_names": list(classes),
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": config.n_classes,
            "input_size": [config.n_channels, *config.image_hw],
            "mean": channel_values(config, data.mean),
            "std": channel_values(config, data.std),
            "interpolation": data.interpolation,
            "crop_mode": {fit: mode for mode, fit in MODES.items()}[data.fit],
            "crop_pct": _share(config.image_hw[0], round(config.image_hw[0] / data.crop_pct)),
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return {"config.json": about}


TIMM = Layout(
    "timm",
    re.compile(r"patch_embed\.|blocks\.\d+\.(attn|ls\d)\."),
    _find,
    _names,
    CLASS,
    POSITIONS,
    registers=REGISTERS,
    needs={"head": ("linear",), "layer_norm_eps": (1e-5, 1e-6)},
    describe=_describe,
)
