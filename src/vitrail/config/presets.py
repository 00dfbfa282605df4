"""Presets: complete configurations by name, each with its purpose, duration and accuracy."""

from dataclasses import dataclass, replace
from typing import Literal

from vitrail.config.settings import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from vitrail.errors import ConfigError, nearest


@dataclass(frozen=True)
class Preset:
    """A configuration and what to expect from it."""

    config: Config
    summary: str
    expect: str


def _reference(n_layers: int) -> Config:
    """Return the recipe of the reference implementation: model, data, augmentation, optimizer.

    Source: https://github.com/nick8592/ViT-Classification-CIFAR10, train.py.
    """
    return Config(
        model=ModelConfig(n_layers=n_layers),
        data=DataConfig(dataset="cifar10", validation_images=0),
        augment=AugmentConfig(randaugment_ops=2, randaugment_magnitude=9),
        training=TrainingConfig(schedule_by="epoch", decay="all"),
        run=RunConfig(monitor="test"),
    )


def _recipe(
    dataset: Literal["shapes", "cifar10"],
    *,
    stem_channels: tuple[int, ...] = (),
    stem_pools: tuple[int, ...] = (),
    patch_size: int,
    embed_dim: int,
    n_layers: int,
    epochs: int,
    batch_size: int = 256,
    muon_learning_rate: float = 0.1,
) -> Config:
    """Return a model with convolutional stem, rotary positions and mean pooling, and Muon.

    No dropout; only crop and flip. What each part is worth: docs/log.md.
    """
    return Config(
        model=ModelConfig(
            patch_size=patch_size, embed_dim=embed_dim, n_layers=n_layers,
            n_attention_heads=max(embed_dim // 32, 4), dropout=0.0, pool="mean", stem="conv",
            stem_channels=stem_channels, stem_pools=stem_pools, position="rope", head="linear",
        ),
        data=DataConfig(dataset=dataset),
        augment=AugmentConfig(crop_padding=2, flip="alternating"),
        training=TrainingConfig(
            epochs=epochs, batch_size=batch_size, learning_rate=2e-3, warmup_epochs=0.1,
            schedule="linear", optimizer="muon", muon_learning_rate=muon_learning_rate,
            weight_decay=0.01, label_smoothing=0.1,
        ),
    )  # fmt: skip


def _small() -> Config:
    """Return the flagship: 64 tokens, most operations in the blocks, and more augmentation."""
    recipe = _recipe(
        "cifar10", stem_channels=(64, 64, 192, 192), stem_pools=(1, 3), patch_size=4,
        embed_dim=192, n_layers=4, epochs=18, muon_learning_rate=0.02,
    )  # fmt: skip
    return replace(
        recipe,
        model=replace(recipe.model, init_std=0.05),
        augment=AugmentConfig(
            crop_padding=4, flip="alternating", randaugment_ops=1, randaugment_magnitude=9,
            random_erasing=0.25, strong_until=0.8,
        ),
    )  # fmt: skip


def _base() -> Config:
    """Return a recipe for hundreds of epochs on a GPU: a larger model, and more augmentation."""
    recipe = _recipe(
        "cifar10", stem_channels=(128, 256, 256), patch_size=4, embed_dim=256, n_layers=8,
        epochs=300, batch_size=512, muon_learning_rate=0.02,
    )  # fmt: skip
    return replace(
        recipe,
        model=replace(recipe.model, drop_path=0.1),
        augment=AugmentConfig(
            crop_padding=4, randaugment_ops=2, randaugment_magnitude=9, random_erasing=0.25,
            cutmix=1.0, strong_until=0.9, mix_until=0.8,
        ),
        training=replace(
            recipe.training, warmup_epochs=10.0, schedule="cosine", ema_decay=0.999
        ),
    )  # fmt: skip


PRESETS = {
    "quick": Preset(
        _recipe("shapes", patch_size=4, embed_dim=64, n_layers=4, epochs=5, batch_size=100),
        "generated shapes, a small model: try out all commands",
        "2 to 4 minutes on a laptop: 99.1% on shapes (records/quick)",
    ),
    "fast": Preset(
        _recipe(
            "cifar10",
            stem_channels=(32, 64, 128, 192),
            patch_size=8,
            embed_dim=192,
            n_layers=1,
            epochs=3,
        ),
        "CIFAR-10, the fastest way past the reference's 78.31%",
        "100 seconds on two AVX-512 cores, 4.5 minutes without: 81.7% (records/fast)",
    ),
    "small": Preset(
        _small(),
        "CIFAR-10, the best accuracy within 90 minutes on two CPU cores",
        "72 minutes on two AVX-512 cores: 90.3% (records/small)",
    ),
    "base": Preset(
        _base(),
        "CIFAR-10, for ten minutes on a large GPU",
        "not measured (no GPU was available)",
    ),
    "reference": Preset(
        _reference(n_layers=6),
        "the reference implementation's recipe, 6 layers, CIFAR-10",
        "200 epochs: published 78.31%; --epochs 10: 62.0% (records/reference-10-epochs)",
    ),
    "reference12": Preset(
        _reference(n_layers=12),
        "the reference implementation's recipe, 12 layers, CIFAR-10",
        "200 epochs: published 82.04%",
    ),
}


def get_preset(name: str) -> Config:
    """Return the preset with this name.

    Raises:
        ConfigError: there is none; the message suggests the nearest name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}{nearest(name, PRESETS)}: one of {', '.join(PRESETS)}"
        )
    return PRESETS[name].config
