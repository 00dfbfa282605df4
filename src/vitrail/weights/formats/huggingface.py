"""Hugging Face's ViTForImageClassification: a folder of config.json and model.safetensors.

Source: https://github.com/huggingface/transformers, models/vit/modeling_vit.py. Since version 5
its modules bear shorter names than its files; both are read, and the files' names are written.
"""

import re
from typing import Any

from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.errors import CheckpointError
from vitrail.weights.formats.processor import read_processor
from vitrail.weights.formats.rules import (
    Found,
    Layout,
    Rule,
    State,
    choose_heads,
    count_layers,
    forward_mul,
    same,
    shape,
    square_image,
    square_patch,
    stacked,
    tokens,
)

EMBEDDINGS = "vit.embeddings"
STEM, POSITIONS = (
    f"{EMBEDDINGS}.patch_embeddings.projection.weight",
    f"{EMBEDDINGS}.position_embeddings",
)
ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
NEW_NAMES = (
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", r".attention.attention.\1."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attention\.attention\.q\.", ".attention.attention.query."),
    (r"\.attention\.attention\.k\.", ".attention.attention.key."),
    (r"\.attention\.attention\.v\.", ".attention.attention.value."),
)
UNUSED = re.compile(r"vit\.pooler\.dense\.|vit\.embeddings\.mask_token$")
"""Tensors the classifier does not use."""


def find(state: State, files: dict[str, Any], n_attention_heads: int | None) -> Found:
    """Read the model's settings off its shapes and its config.json."""
    about = files.get("config.json", {})
    notes: list[str] = []
    plain = plain_form(state, notes)
    embed_dim, n_channels, height, width = shape(plain, STEM, 4)
    patch_size = square_patch(height, width, STEM)
    act = about.get("hidden_act", "gelu")
    if act not in ACTS:
        raise CheckpointError(f"hidden_act is {act!r}: only {', '.join(ACTS)}")
    stated = about.get("num_attention_heads")
    hidden_dim = shape(plain, "vit.encoder.layer.0.intermediate.dense.weight", 2)[0]
    n_classes = len(plain["classifier.weight"]) if "classifier.weight" in plain else 0
    config = ModelConfig(
        image_size=image_size(about, shape(plain, POSITIONS, 3)[1] - 1, patch_size),
        n_channels=n_channels,
        n_classes=n_classes,
        patch_size=patch_size,
        embed_dim=embed_dim,
        n_layers=count_layers(plain, r"vit\.encoder\.layer\.(\d+)\."),
        n_attention_heads=choose_heads(embed_dim, n_attention_heads, stated, notes),
        forward_mul=forward_mul(hidden_dim, embed_dim),
        head="linear",
        hidden_act=ACTS[act],  # type: ignore[arg-type]
        layer_norm_eps=float(about.get("layer_norm_eps", 1e-12)),
    )
    labels = about.get("id2label", {})
    classes = tuple(str(labels[str(index)]) for index in range(n_classes) if str(index) in labels)
    processor = files.get("preprocessor_config.json")
    data = {} if processor is None else read_processor(processor, config.image_hw, notes)
    return Found(config, plain, notes, classes, data, {"fit": "squash"})


def plain_form(state: State, notes: list[str]) -> State:
    """Bring variants to the plain form of its files, saying so."""
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key if key.startswith(("vit.", "classifier.")) else f"vit.{key}"
        for new, old in NEW_NAMES:
            name = re.sub(new, old, name)
        if UNUSED.match(name):
            notes.append(f"{key}: left out, the classifier does not use it")
        else:
            plain[name] = tensor
    for key in [key for key in plain if re.search(r"\.attention\.(query|key|value)\.weight$", key)]:
        bias = f"{key.removesuffix('weight')}bias"
        if bias not in plain:
            plain[bias] = plain[key].new_zeros(len(plain[key]))
            notes.append(f"{bias}: not there, so zeros")
    notes.append("the class token's position is added to the class token")
    return plain


def image_size(about: dict[str, Any], n_patches: int, patch_size: int) -> int | tuple[int, int]:
    """Return the image size in config.json, or that of a square."""
    stated = about.get("image_size")
    if stated is None:
        return square_image(n_patches, patch_size, POSITIONS)
    return stated if isinstance(stated, int) else (int(stated[0]), int(stated[1]))


def rules(config: ModelConfig) -> list[Rule]:
    """Return its table of names."""
    table = [
        *same("stem", f"{EMBEDDINGS}.patch_embeddings.projection"),
        tokens(f"{EMBEDDINGS}.cls_token", POSITIONS),
        *same("norm", "vit.layernorm"),
    ]
    for index in range(config.n_layers):
        ours, theirs = f"blocks.{index}", f"vit.encoder.layer.{index}"
        names = ("query", "key", "value")
        table += stacked(
            f"{ours}.attention.qkv", (f"{theirs}.attention.attention.{name}" for name in names)
        )
        for mine, other in (
            ("attention.out_projection", "attention.output.dense"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            table += same(f"{ours}.{mine}", f"{theirs}.{other}")
    return [*table, *(same("head", "classifier") if config.n_classes else [])]


def describe(config: ModelConfig, about: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json from which ``from_pretrained`` builds the model."""
    size = config.image_size
    return {
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
        "id2label": {str(index): name for index, name in enumerate(about["classes"])},
        "label2id": {name: index for index, name in enumerate(about["classes"])},
    }


HUGGINGFACE = Layout(
    "huggingface",
    re.compile(
        r"(vit\.)?embeddings\.(patch_embeddings|position_embeddings|cls_token)"
        r"|(vit\.)?encoder\.layer\.|vit\.layers\."
    ),
    find,
    rules,
    {"stem": ("patch",), "position": ("learned",), "pool": ("cls",), "head": ("linear",)},
)
