"""Classifiers whose networks run as graphs."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from vitrail.config.settings import Config, ModelConfig
from vitrail.errors import ConfigError
from vitrail.inference.classifier import Classifier
from vitrail.model.vit import VisionTransformer


def make(changes: dict[str, Any]) -> Classifier:
    torch.manual_seed(1)
    config = ModelConfig(
        image_size=16, n_classes=3, patch_size=4, embed_dim=24, n_layers=2, n_attention_heads=3,
        init_std=0.3,
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)
    model = VisionTransformer(config).eval()
    return Classifier(model, Config(model=config), ("a", "b", "c"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "mean", "position": "rope", "stem": "conv"},
        {"pool": "cls_mean", "class_token": True, "n_registers": 2, "position": "rope_centered"},
        {"position": "sincos", "hidden_act": "swiglu", "layer_scale": 0.5, "pre_norm": True},
        {"image_size": (8, 12), "n_channels": 1, "head": "linear", "dropout": 0.5},
    ],
    ids=str,
)
def test_a_graph_predicts_the_same_for_any_number_of_pictures(changes: dict[str, Any]) -> None:
    classifier = make(changes)
    traced, config = classifier.trace(), classifier.config.model
    calls: list[object] = []
    classifier.model.register_forward_pre_hook(lambda *_: calls.append(0))
    classifier.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    rng = np.random.default_rng(2)
    for count in (1, 2, 7):
        shape = (count, *config.image_hw, config.n_channels)
        raw_BHWC = rng.integers(256, size=shape, dtype=np.uint8)
        expected_BY = classifier.raw_logits(raw_BHWC)
        assert calls.pop() == 1
        assert not calls
        np.testing.assert_array_equal(traced.raw_logits(raw_BHWC), expected_BY)
        assert not calls  # Python's modules were not called
        assert expected_BY.shape == (count, 3)
        assert np.ptp(expected_BY, axis=1).min() > 1e-3


def test_a_graph_refuses_images_of_another_size() -> None:
    with pytest.raises(ConfigError, match="images have shape"):
        make({}).trace().logits(torch.zeros(1, 3, 16, 20))
