"""Weights of the reference system: parity, what is read off the shapes, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vitrine
from vitrine.errors import CheckpointError, ConfigError
from vitrine.model.convert import convert_reference


def reference_state(*, dim: int = 6, hidden: int = 9, layers: int = 2) -> dict[str, Tensor]:
    """A state dict of the reference's layout: patch 5, 3x3 patches, 7 classes."""
    shapes = {
        "embedding.conv1.weight": (dim, 3, 5, 5),
        "embedding.conv1.bias": (dim,),
        "embedding.pos_embedding": (1, 9, dim),
        "embedding.cls_token": (1, 1, dim),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "classifier.fc1.weight": (dim, dim),
        "classifier.fc1.bias": (dim,),
        "classifier.fc2.weight": (7, dim),
        "classifier.fc2.bias": (7,),
    }
    for layer in range(layers):
        square = [f"attention.{n}" for n in ("queries", "keys", "values", "out_projection")]
        sizes = dict.fromkeys(square, (dim, dim))
        sizes |= {"fc1": (hidden, dim), "fc2": (dim, hidden), "norm1": (dim,), "norm2": (dim,)}
        for name, shape in sizes.items():
            shapes[f"encoder.{layer}.{name}.weight"] = shape
            shapes[f"encoder.{layer}.{name}.bias"] = shape[:1]
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_settings_are_read_off_the_shapes() -> None:
    config, _ = convert_reference(reference_state(), n_attention_heads=3)
    assert (config.image_size, config.patch_size, config.n_classes) == (15, 5, 7)
    assert (config.embed_dim, config.hidden_dim, config.n_layers) == (6, 9, 2)
    assert config.n_attention_heads == 3


def test_a_head_count_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="n_attention_heads 4"):
        convert_reference(reference_state())


@pytest.mark.parametrize("key", ["encoder.1.attention.keys.bias", "norm.weight"])
def test_a_missing_key_is_named(key: str) -> None:
    state = reference_state()
    del state[key]
    with pytest.raises(CheckpointError, match=key):
        convert_reference(state, n_attention_heads=3)


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"encoder\.0\.extra"):
        convert_reference(
            {**reference_state(), "encoder.0.extra": torch.ones(2)}, n_attention_heads=3
        )


def test_parity_with_the_references_own_code(reference: Path) -> None:
    classifier = vitrine.load(reference / "seed-layer3-dim32.pt", device="cpu")
    expected = np.load(reference / "seed-layer3-dim32_expected.npz")
    with torch.no_grad():
        logits_BY, attentions = classifier.model.forward_with_attention(
            torch.from_numpy(expected["images"])
        )
    logits_error = np.abs(logits_BY.numpy() - expected["logits"]).max()
    attention_error = np.abs(torch.stack(attentions).numpy() - expected["attention"]).max()
    assert logits_error < 1e-5
    assert attention_error < 1e-6
    assert classifier.classes[0] == "plane"


def test_another_head_count_gives_another_model(reference: Path) -> None:
    path = reference / "seed-layer3-dim32.pt"
    images_BCHW = torch.from_numpy(np.load(path.with_name(f"{path.stem}_expected.npz"))["images"])
    with torch.no_grad():
        four, eight = (
            vitrine.load(path, n_attention_heads=heads, device="cpu").model(images_BCHW)
            for heads in (None, 8)
        )
    assert not torch.allclose(four, eight, atol=1e-3)
