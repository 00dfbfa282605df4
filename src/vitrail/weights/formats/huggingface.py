"""Hugging Face's ViT and DeiT for classification: weights, config.json, preprocessor_config.json.

Sources: https://github.com/huggingface/transformers, models/vit/modeling_vit.py,
models/deit/modeling_deit.py (read only; the distillation token is a register) and, for
preprocessor_config.json, models/vit/image_processing_vit.py and
models/clip/image_processing_clip.py: resize, center crop, rescale, normalize, in this order. Since
version 5 its modules have shorter names than its files; both are read; the files' are written.
"""

import re
from typing import Any

import torch
from torch import Tensor

from vitrail.config.settings import DataConfig, ModelConfig
from vitrail.errors import CheckpointError, ConfigError
from vitrail.weights.formats import (
    PREPARATION_FLAGS,
    Converted,
    Files,
    Layout,
    Names,
    State,
    block_names,
    channel_values,
    choose_heads,
    fill_biases,
    first_few,
    merge_heads,
    read_shapes,
    rgb_values,
    shape,
    square_image,
)

POSITIONS, REGISTERS = "vit.embeddings.position_embeddings", "vit.embeddings.register_tokens"
HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")
NAMES = {
    "stem": ("vit.embeddings.patch_embeddings.projection",),
    "norm": ("vit.layernorm",),
    "head": ("classifier",),
    **block_names(
        "vit.encoder.layer.*.",
        {
            "norm1": ("layernorm_before",),
            "attention.qkv": tuple(
                f"attention.attention.{name}" for name in ("query", "key", "value")
            ),
            "attention.out_projection": ("attention.output.dense",),
            "norm2": ("layernorm_after",),
            "mlp.fc1": ("intermediate.dense",),
            "mlp.fc2": ("output.dense",),
        },
    ),
}
ACTS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}  # fmt: skip
NEW_NAMES = {
    "vit.layers.": "vit.encoder.layer.",
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
UNUSED_WEIGHTS = re.compile(r"vit\.pooler\.dense\.|vit\.embeddings\.mask_token$")
"""Tensors that the classifier does not use."""
PROCESSOR = "preprocessor_config.json"
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Resampling filters in the order of Pillow's numbers."""
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
IGNORED_STEPS = ("do_convert_rgb", "do_reduce_labels")
"""Steps that Vitrail always performs, or that do not concern the picture."""
UNSUPPORTED = ("crop_pct", "rescale_offset", "offset")
"""Settings of processors that work differently."""
SQUARE_SIZE = ("ViT", "DeiT", "Beit")
"""Processors whose size, if one number, is both sides; for others it is the shorter side."""
REQUIRED = ("do_resize", "do_center_crop", "do_normalize", "size", "resample", "image_mean",
            "image_std")  # fmt: skip
"""Settings required of processors whose defaults differ from ViTImageProcessor's."""


def _find(state: State, files: dict[str, Any], n_attention_heads: int | None) -> Converted:
    """Read the model's settings off its shapes and its config.json."""
    about = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, **files.get("config.json", {})}
    notes: list[str] = []
    plain = _standard_form(state, notes)
    merged = merge_heads(plain, ("cls_classifier", "distillation_classifier"), "classifier", notes)
    settings = read_settings(plain, NAMES, about, n_attention_heads, notes)
    n_patches = shape(plain, POSITIONS, 3)[1] - 1
    size = about.get("image_size") or square_image(n_patches, settings["patch_size"])
    config = ModelConfig(
        image_size=size if isinstance(size, int) else (int(size[0]), int(size[1])),
        pool="cls_register" if merged else "cls",
        n_registers=int(REGISTERS in plain),
        **settings,
    )
    data = read_processor(files.get(PROCESSOR, {}), config.image_hw, notes)
    classes = read_classes(about, config.n_classes)
    return Converted(config, plain, notes, classes, data, {"fit": "squash"})


def read_settings(
    plain: State, names: Names, about: dict[str, Any], asked: int | None, notes: list[str]
) -> dict[str, Any]:
    """Return the settings that shapes and config.json show in the same way for all models."""
    shapes = read_shapes(plain, names)
    act, heads = about["hidden_act"], about.get("num_attention_heads")
    if act not in ACTS:
        raise CheckpointError(f"hidden_act is {act!r}: not one of {', '.join(ACTS)}")
    return {
        "n_attention_heads": choose_heads(shapes["embed_dim"], asked, heads, notes),
        "head": "linear",
        "hidden_act": ACTS[act],
        "layer_norm_eps": float(about["layer_norm_eps"]),
        **shapes,
    }


def read_classes(about: dict[str, Any], n_classes: int) -> tuple[str, ...]:
    """Return the class names in config.json."""
    labels = about.get("id2label", {})
    return tuple(str(labels[i]) for i in map(str, range(n_classes)) if i in labels)


def _standard_form(state: State, notes: list[str]) -> dict[str, Tensor]:
    """Rename variants to the standard names and fill gaps, with notes."""
    plain: dict[str, Tensor] = {}
    unused = []
    for key, tensor in state.items():
        name = re.sub(r"^deit\.", "vit.", key)
        name = name if name.startswith(("vit.", *HEADS)) else f"vit.{name}"
        for new, old in NEW_NAMES.items():
            name = name.replace(new, old)
        if UNUSED_WEIGHTS.match(name):
            unused.append(key)
        else:
            plain[name] = tensor
    if unused:
        notes.append(f"{first_few(unused)}: ignored, the classifier does not use it")
    fill_biases(plain, NAMES, notes)
    notes.append("the class token's position is added to the class token")
    token = plain.pop("vit.embeddings.distillation_token", None)
    if token is not None:
        table_1TD = plain[POSITIONS]
        plain[REGISTERS] = token + table_1TD[:, 1:2]
        plain[POSITIONS] = torch.cat([table_1TD[:, :1], table_1TD[:, 2:]], dim=1)
        notes.append("the distillation token, with its position added, becomes a register")
    return plain


def _describe(config: ModelConfig, data: DataConfig, classes: tuple[str, ...]) -> Files:
    """Return the files from which ``from_pretrained`` builds the model and its processor."""
    size = config.image_size
    about = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "image_size": size if isinstance(size, int) else list(size),
        "patch_size": config.patch_size,
        "num_channels": config.n_channels,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_attention_heads,
        "intermediate_size": config.hidden_dim,
        "hidden_act": "gelu" if config.hidden_act == "gelu" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": True,
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }
    return {"config.json": about, PROCESSOR: _write_processor(config, data)}


def made_size(about: dict[str, Any], image_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the pictures that preprocessor_config.json yields, else the given one."""
    if about.get("do_center_crop"):
        return _read_size(about.get("crop_size", image_hw), "ViT")[1]
    return image_hw


def read_processor(
    about: dict[str, Any], image_hw: tuple[int, int], notes: list[str]
) -> dict[str, Any]:
    """Return the fields of DataConfig that preprocessor_config.json specifies, if supported."""
    kind = str(about.get("image_processor_type") or about.get("feature_extractor_type") or "ViT")
    steps = {name for name in about if name.startswith("do_")} - {*STEPS, *IGNORED_STEPS}
    if unsupported := sorted(name for name in (*steps, *UNSUPPORTED) if about.get(name)):
        raise CheckpointError(
            f"{PROCESSOR}: {unsupported[0]} {about[unsupported[0]]!r:.40} is not supported: "
            f"{PREPARATION_FLAGS}"
        )
    if not kind.startswith("ViT") and (gaps := [name for name in REQUIRED if name not in about]):
        raise CheckpointError(f"{PROCESSOR} of a {kind:.60} lacks {gaps[0]}: {PREPARATION_FLAGS}")
    data = _colors(about)
    if (filter_number := about.get("resample")) is not None:
        if filter_number not in range(len(FILTERS)):
            raise CheckpointError(f"{PROCESSOR}: resample is {filter_number!r:.40}, not 0 to 5")
        data["interpolation"] = FILTERS[filter_number]
    return data | _geometry(about, kind, image_hw, notes)


def _colors(about: dict[str, Any]) -> dict[str, Any]:
    """Return mean and std for pixels in [0, 1], if the file has them or scales differently."""
    factor = float(about.get("rescale_factor", 1 / 255)) if about.get("do_rescale", True) else 1.0
    scale = 255 * factor
    if not about.get("do_normalize", True):
        return {"mean": (0.0,) * 3, "std": (1 / scale,) * 3}
    found = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if about.get(theirs) is not None or scale != 1:
            values = rgb_values(about.get(theirs, 0.5), f"{PROCESSOR}: {theirs}")
            found[ours] = tuple(value / scale for value in values)
    return found


def _geometry(
    about: dict[str, Any], kind: str, image_hw: tuple[int, int], notes: list[str]
) -> dict[str, Any]:
    """Return fit and crop_pct; refuse pictures of a size other than the model's."""
    crops = bool(about.get("do_center_crop"))
    if not about.get("do_resize", True):
        if crops:
            raise CheckpointError(
                f"{PROCESSOR}: do_center_crop without do_resize: {PREPARATION_FLAGS}"
            )
        notes.append("do_resize is false: pictures of another size are stretched anyway")
        return {"fit": "squash", "crop_pct": 1.0}
    size = about.get("size")
    if size is None and not crops:
        return {}
    shortest, resized_hw = _read_size(size or image_hw, kind)
    _, made_hw = _read_size(about.get("crop_size", image_hw), kind) if crops else (0, resized_hw)
    if made_hw != image_hw:
        raise CheckpointError(
            f"{PROCESSOR} produces pictures of {made_hw[0]} x {made_hw[1]} pixels, but the model "
            f"reads {image_hw[0]} x {image_hw[1]}"
        )
    shares = {image / side for image, side in zip(image_hw, resized_hw, strict=True)}
    if len(shares) > 1 or max(shares) > 1:
        raise CheckpointError(
            f"{PROCESSOR}: size {size} with crop_size {made_hw}: {PREPARATION_FLAGS}"
        )
    if shortest and not crops:
        notes.append("pictures that are not square are cropped")
    return {"fit": "crop" if shortest else "squash", "crop_pct": shares.pop()}


def _read_size(size: Any, kind: str) -> tuple[bool, tuple[int, int]]:
    """Return whether a size is only that of the shorter side, and height and width."""
    if isinstance(size, int):
        return not kind.startswith(SQUARE_SIZE), (size, size)
    if not isinstance(size, dict):
        return False, (int(size[0]), int(size[1]))
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return True, (int(size["shortest_edge"]),) * 2
    if {"height", "width"} - set(size):
        raise CheckpointError(f"{PROCESSOR}: size {size!s:.60}: {PREPARATION_FLAGS}")
    return False, (int(size["height"]), int(size["width"]))


def _write_processor(model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """Return the preprocessor_config.json that prepares pictures for the model."""
    height, width = model.image_hw
    if data.fit == "pad" or (data.fit == "crop" and height != width):
        raise ConfigError(
            f"Hugging Face's image processors do not support fit {data.fit} for {height} x {width} "
            "pixels: choose another, e.g. --fit squash"
        )
    cut = data.fit == "crop" or data.crop_pct < 1
    kind = "CLIP" if data.fit == "crop" else "DeiT" if cut else "ViT"
    rows, columns = round(height / data.crop_pct), round(width / data.crop_pct)
    size = {"shortest_edge": rows} if data.fit == "crop" else {"height": rows, "width": columns}
    crop = {"do_center_crop": cut, "crop_size": {"height": height, "width": width}}
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_convert_rgb": model.n_channels == 3,
        "do_resize": True,
        "size": size,
        "resample": FILTERS.index(data.interpolation),
        **(crop if cut else {"do_center_crop": False}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": channel_values(model, data.mean),
        "image_std": channel_values(model, data.std),
    }


HUGGINGFACE = Layout(
    "huggingface",
    re.compile(
        r"(vit\.|deit\.)?embeddings\.(patch_embeddings|position_embeddings|cls_token)"
        r"|(vit\.|deit\.)?encoder\.layer\.\d+\.(layernorm_|attention|intermediate|output)"
        r"|(vit|deit)\.layers\."
    ),
    _find,
    lambda _: NAMES,
    class_token="vit.embeddings.cls_token",
    positions=POSITIONS,
    registers=REGISTERS,
    needs={"pool": ("cls",), "head": ("linear",)},
    describe=_describe,
)
