"""The reference's state dicts: separate layers for queries, keys and values; an MLP head."""

import re
from typing import Any

from vitrail.config.settings import ModelConfig
from vitrail.data.cifar import CIFAR10_CLASSES
from vitrail.weights.formats.layout import (
    Found,
    Layout,
    Rule,
    State,
    class_token,
    count_layers,
    positions,
    same,
    shape,
    square_image,
    square_patch,
    stacked,
)

HEADS = 4
"""The reference's default head count, which its files do not contain."""
DATA_SETTINGS = {
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "fit": "squash", "interpolation": "bilinear",
    "crop_pct": 1.0,
}  # fmt: skip
"""How its code prepares pictures."""
STEM, POSITIONS = "embedding.conv1.weight", "embedding.pos_embedding"


def _find(state: State, _: dict[str, Any], n_attention_heads: int | None) -> Found:
    """Read the model's settings off its shapes."""
    embed_dim, n_channels, height, width = shape(state, STEM, 4)
    patch_size = square_patch(height, width, STEM)
    n_classes = shape(state, "classifier.fc2.weight", 2)[0]
    config = ModelConfig(
        image_size=square_image(shape(state, POSITIONS, 3)[1], patch_size, POSITIONS),
        n_channels=n_channels,
        n_classes=n_classes,
        patch_size=patch_size,
        embed_dim=embed_dim,
        n_layers=count_layers(state, r"encoder\.(\d+)\."),
        n_attention_heads=n_attention_heads or HEADS,
        forward_mul=shape(state, "encoder.0.fc1.weight", 2)[0] / embed_dim,
    )
    notes = [] if n_attention_heads else [f"assumed n_attention_heads {HEADS}: not in the file"]
    classes = CIFAR10_CLASSES if n_classes == len(CIFAR10_CLASSES) else ()
    return Found(config, state, notes, classes, DATA_SETTINGS)


def _rules(config: ModelConfig) -> list[Rule]:
    """Return the layout's rules for one model."""
    table = [
        *same("stem", "embedding.conv1"),
        positions(POSITIONS),
        class_token("embedding.cls_token"),
        *same("norm", "norm"),
    ]
    for index in range(config.n_layers):
        ours, theirs = f"blocks.{index}", f"encoder.{index}"
        names = ("queries", "keys", "values")
        table += stacked(f"{ours}.attention.qkv", (f"{theirs}.attention.{name}" for name in names))
        for mine, other in (
            ("attention.out_projection", "attention.out_projection"),
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("mlp.fc1", "fc1"),
            ("mlp.fc2", "fc2"),
        ):
            table += same(f"{ours}.{mine}", f"{theirs}.{other}")
    return [*table, *same("head.fc1", "classifier.fc1"), *same("head.fc2", "classifier.fc2")]


REFERENCE = Layout(
    "reference",
    re.compile(r"embedding\.conv1\.|encoder\.\d+\.attention\.(queries|keys|values)\."),
    _find,
    _rules,
    {
        "pool": ("cls",),
        "head": ("mlp",),
        "hidden_act": ("gelu",),
        "layer_norm_eps": (1e-5,),
    },
)
