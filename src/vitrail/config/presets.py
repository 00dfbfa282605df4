"""Presets: complete configurations by name, each with its purpose, duration and accuracy."""

from dataclasses import dataclass, replace
from typing import Any, Literal

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
    epochs: int,
    batch_size: int,
    rate: float,
    **model: Any,
) -> Config:
    """Return a model with convolutional stem, rotary positions and mean pooling, and Muon.

    No dropout; only crop and flip. docs/log.md measures the effect of each part.

    Args:
        dataset, epochs, batch_size: as in the settings.
        rate: Muon's learning rate. The more updates, the lower the best one.
        model: fields of ModelConfig.
    """
    shape = {"dropout": 0.0, "pool": "mean", "stem": "conv", "position": "rope", "head": "linear"}
    return Config(
        model=ModelConfig(**{**shape, **model}),
        data=DataConfig(dataset=dataset),
        augment=AugmentConfig(crop_padding=2, flip="alternating"),
        training=TrainingConfig(
            epochs=epochs, batch_size=batch_size, learning_rate=2e-3, warmup_epochs=0.1,
            schedule="linear", optimizer="muon", muon_learning_rate=rate, weight_decay=0.01,
            label_smoothing=0.1,
        ),
    )  # fmt: skip


def _quick() -> Config:
    """Return a small model for the shapes dataset: trained in two minutes on two CPU cores."""
    return _recipe(
        "shapes", epochs=5, batch_size=100, rate=0.1,
        patch_size=4, embed_dim=64, n_layers=4, n_attention_heads=4,
    )  # fmt: skip


def _fast() -> Config:
    """Return the fastest learner on CIFAR-10: few, wide tokens after a deep stem, no crops."""
    recipe = _recipe(
        "cifar10", epochs=3, batch_size=256, rate=0.045,
        patch_size=8, embed_dim=192, n_layers=1, n_attention_heads=6, init_std=0.05,
        stem_channels=(32, 64, 128, 192),
    )  # fmt: skip
    return replace(recipe, augment=replace(recipe.augment, crop_padding=0))


STRONG = AugmentConfig(
    crop_padding=4, flip="alternating", randaugment_ops=1, randaugment_magnitude=9,
    random_erasing=0.25, strong_until=0.8,
)  # fmt: skip
"""Augmentation for tens of epochs on CIFAR-10."""


def _mixed(recipe: Config, *, mix_until: float, strong_until: float) -> Config:
    """Add strong augmentation, and CutMix on half of the batches, each for a part of the run."""
    augment = replace(
        STRONG, cutmix=1.0, mix_probability=0.5, mix_until=mix_until, strong_until=strong_until
    )
    return replace(recipe, augment=augment, training=replace(recipe.training, label_smoothing=0.05))


def _small() -> Config:
    """Return the flagship: 64 tokens, most of the compute in the blocks, and more augmentation."""
    recipe = _recipe(
        "cifar10", epochs=33, batch_size=256, rate=0.01,
        patch_size=4, embed_dim=192, n_layers=4, n_attention_heads=6, init_std=0.05,
        stem_channels=(64, 64, 128, 160, 192), stem_pools=(1, 3),
    )  # fmt: skip
    return _mixed(recipe, mix_until=0.9, strong_until=1.0)


def _vit() -> Config:
    """Return a plain ViT: the reference's patches, depth and widths, and no convolutional stem."""
    recipe = _recipe(
        "cifar10", epochs=60, batch_size=256, rate=0.01,
        stem="patch", init_std=0.1,
    )  # fmt: skip
    return _mixed(recipe, mix_until=0.85, strong_until=0.9)


def _base() -> Config:
    """Return a recipe for a large GPU: ten times the parameters, and more augmentation."""
    recipe = _recipe(
        "cifar10", epochs=300, batch_size=512, rate=0.01,
        patch_size=4, embed_dim=384, n_layers=8, n_attention_heads=6, forward_mul=4,
        drop_path=0.1, stem_channels=(128, 128, 384, 384), stem_pools=(1, 3),
    )  # fmt: skip
    augment = replace(
        STRONG, randaugment_ops=2, cutmix=1.0, mixup=0.2, mix_until=0.8, strong_until=0.9
    )
    training = replace(recipe.training, warmup_epochs=10.0, schedule="cosine", ema_decay=0.999)
    return replace(recipe, augment=augment, training=training)


PRESETS = {
    "quick": Preset(
        _quick(),
        "generated shapes, a small model: try out all commands",
        "2 to 4 minutes on a laptop: 99.7% on shapes (records/quick)",
    ),
    "fast": Preset(
        _fast(),
        "CIFAR-10, the fastest way past the reference's 78.31%",
        "2 minutes on two AVX-512 cores: 85.8% (records/fast)",
    ),
    "small": Preset(
        _small(),
        "CIFAR-10, the best accuracy within two hours on two CPU cores",
        "50 minutes on two AVX-512 bf16 cores (AMD), else 2 hours: 93.0% (records/small)",
    ),
    "vit": Preset(
        _vit(),
        "CIFAR-10, plain patches, the reference's depth and widths",
        "2 hours on two AVX-512 cores: 88.6% (records/vit)",
    ),
    "base": Preset(
        _base(),
        "CIFAR-10, for a large GPU: 16 million parameters",
        "97 PFLOP; time and accuracy not measured (no GPU was available)",
    ),
    "reference": Preset(
        _reference(n_layers=6),
        "the reference implementation's recipe, 6 layers, CIFAR-10",
        "2.6 hours on two AVX-512 bf16 cores: 85.2% (records/reference-200-epochs)",
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
