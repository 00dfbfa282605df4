"""Weights of other systems, converted both ways: reference, timm, Hugging Face, Google."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.config.settings import PREPARATION, DataConfig, ModelConfig
from vitrail.errors import CheckpointError, ConfigError
from vitrail.model.layers import sincos_table
from vitrail.model.vit import VisionTransformer
from vitrail.weights.formats.google import GOOGLE
from vitrail.weights.formats.huggingface import HUGGINGFACE
from vitrail.weights.formats.reference import REFERENCE
from vitrail.weights.formats.rules import Layout, State, first, read_rules, write_rules
from vitrail.weights.formats.timm import TIMM
from vitrail.weights.formats.unwrap import unwrap

LAYOUTS = {layout.name: layout for layout in (REFERENCE, TIMM, HUGGINGFACE, GOOGLE)}


class Converted(NamedTuple):
    """A model of another system, in our terms."""

    layout: str
    config: ModelConfig
    """n_classes is 0 where the weights have no head."""
    weights: dict[str, Tensor]
    tensors: int
    """How many of its tensors were read."""
    notes: list[str]
    """What was assumed, changed or left out."""
    classes: tuple[str, ...]
    """Names, where its files contain them."""
    data: dict[str, Any]
    """How pictures are prepared: the fields of PREPARATION."""
    assumed: tuple[str, ...]
    """Which of these its files do not specify."""
    refused: dict[str, str]
    """Which of these its files specify in a way that Vitrail does not support, and how."""


def is_known(key: str) -> bool:
    """Return whether a key is one of a layout's."""
    return any(layout.signs.match(key) for layout in LAYOUTS.values())


def recognize(state: State) -> Layout:
    """Return the layout of a state dict, by the names of its keys.

    Raises:
        CheckpointError: it is none that is known; it names the first keys.
    """
    hits = {
        name: sum(map(bool, map(layout.signs.match, state))) for name, layout in LAYOUTS.items()
    }
    best = max(hits, key=lambda name: hits[name])
    if hits[best] == 0:
        raise CheckpointError(
            f"unrecognized checkpoint format (known: {', '.join(LAYOUTS)}); "
            f"keys: {first(list(state))}"
        )
    return LAYOUTS[best]


def convert(
    state: State, files: dict[str, Any] | None = None, *, n_attention_heads: int | None = None
) -> Converted:
    """Turn another system's state dict into our settings and state dict.

    Layers, widths, patch, image, channels and classes are read off the shapes. Head count,
    activation and class names are not in every file; ``notes`` say what was assumed.

    Args:
        state: the tensors, by their names there.
        files: the JSON files that lay beside them, by name.
        n_attention_heads: where the files do not contain it.

    Raises:
        CheckpointError: keys are missing, unknown or of other shapes; it names the first.
        ConfigError: the head count does not divide the width.
    """
    state, notes = unwrap(state, is_known)
    layout = recognize(state)
    strange = [k for k, t in state.items() if t.numel() == 0 or not t.is_floating_point()]
    if strange:
        raise CheckpointError(f"empty or integer tensors: {first(strange)}")
    floats = {key: tensor.float() for key, tensor in state.items()}
    found = layout.find(floats, files or {}, n_attention_heads)
    rules = layout.rules(found.config)
    weights, unknown = read_rules(rules, found.state, template(found.config), layout.name)
    if unknown:
        raise CheckpointError(
            f"not weights of the layout {layout.name} alone: unknown keys {first(sorted(unknown))}"
        )
    classes = found.classes if len(found.classes) == found.config.n_classes else ()
    usual = {name: getattr(DataConfig(), name) for name in PREPARATION} | found.usual
    assumed = tuple(name for name in usual if name not in found.data and usual[name] is not None)
    return Converted(
        layout.name, found.config, weights, len(state), shorten(notes + found.notes), classes,
        usual | found.data, assumed, found.refused,
    )  # fmt: skip


def restate(config: ModelConfig, weights: State, layout: str) -> dict[str, Tensor]:
    """Return our weights in another layout.

    Raises:
        ConfigError: the layout does not support such a model.
    """
    needs, rules = LAYOUTS[layout].needs, LAYOUTS[layout].rules
    weights = dict(weights)
    if config.position == "sincos" and "learned" in needs["position"]:
        weights["position_ND"] = sincos_table(config.grid_GJ, config.embed_dim)
        config = dataclasses.replace(config, position="learned")
    for name, allowed in needs.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(
                f"the layout {layout} does not support {name} {getattr(config, name)}: "
                f"only {' or '.join(map(str, allowed))}"
            )
    return write_rules(rules(config), weights)


def template(config: ModelConfig) -> dict[str, Tensor]:
    """Return tensors without content (meta) of the shapes that such a model has."""
    with torch.device("meta"):
        model = VisionTransformer(dataclasses.replace(config, n_classes=config.n_classes or 1))
    return dict(model.state_dict())


def shorten(notes: list[str]) -> list[str]:
    """Join equal notes on several keys."""
    keys: dict[str, list[str]] = {}
    for note in notes:
        key, _, words = note.partition(": ") if ": " in note else ("", "", note)
        keys.setdefault(words, []).append(key)
    return [f"{first(names)}: {words}" if names[0] else words for words, names in keys.items()]
