"""Workloads, systems and amounts of a benchmark, and the job that a worker process gets."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vitrail.config.files import to_json
from vitrail.config.settings import AugmentConfig, Config, ModelConfig, TrainingConfig
from vitrail.errors import ConfigError

Workload = Literal["step", "epoch", "inference", "test", "explanation"]

OURS = "vitrail"
REFERENCE = "reference"
PEERS = (REFERENCE, "timm", "vit-pytorch", "transformers sdpa", "transformers eager")

TITLES: dict[Workload, str] = {
    "step": "training step",
    "epoch": "training with data",
    "inference": "inference",
    "test": "testing, pixels to scores",
    "explanation": "attention rollout",
}
PEERS_FOR: dict[Workload, tuple[str, ...]] = {
    "step": PEERS,
    "epoch": (REFERENCE,),
    "inference": PEERS,
    "test": (REFERENCE,),
    "explanation": tuple(name for name in PEERS if name != "transformers sdpa"),
}
"""The systems that can run each workload: only the reference loads data, and fused attention
returns no maps."""
TRAINS = ("step", "epoch")
CLASSES = 10
"""Number of classes if the settings leave it to the dataset, as no dataset is loaded here."""


@dataclass(frozen=True)
class Recipe:
    """The settings that affect speed."""

    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def of(cls, config: Config) -> "Recipe":
        """Return the recipe of a run."""
        return cls(config.model, config.augment, config.training)

    def config(self, precision: str | None = None) -> Config:
        """Return the settings of a run with a fixed number of classes.

        Raises:
            ConfigError: the images are not square.
        """
        height, width = self.model.image_hw
        if height != width:
            raise ConfigError(
                f"image_size is {height} x {width}: the benchmark needs square images"
            )
        classes = self.model.n_classes or CLASSES
        model = dataclasses.replace(self.model, image_size=height, n_classes=classes)
        training = self.training
        if precision is not None:
            training = dataclasses.replace(training, precision=precision)  # type: ignore[arg-type]
        return Config(model=model, augment=self.augment, training=training)

    def changed(self, **values: Any) -> "Recipe":
        """Return the recipe with some fields of any section replaced."""
        sections = {}
        for name, section in vars(self).items():
            own = {key: value for key, value in values.items() if hasattr(section, key)}
            sections[name] = dataclasses.replace(section, **own)
        return Recipe(**sections)


def plain(model: ModelConfig) -> ModelConfig:
    """Return the plain ViT of the same shape, as the other systems implement it."""
    shape = (
        "image_size", "n_channels", "n_classes", "patch_size", "embed_dim", "n_layers",
        "n_attention_heads", "forward_mul", "dropout",
    )  # fmt: skip
    return ModelConfig(**{name: getattr(model, name) for name in shape})


@dataclass(frozen=True)
class Amounts:
    """Work per round: steps, batches, or images of the test split."""

    step: int = 3
    epoch: int = 10
    inference: int = 4
    explanation: int = 2
    test_images: int = 5_000
    rounds: int = 5

    def request(self, workload: Workload) -> int:
        """Return the amount requested from a worker in each round; testing always runs once."""
        return 1 if workload == "test" else int(getattr(self, workload))


QUICK = Amounts(step=1, epoch=2, inference=1, explanation=1, test_images=500, rounds=3)


@dataclass(frozen=True)
class Job:
    """One system with one workload in one precision."""

    system: str
    precision: str
    workload: str

    def spec(self, recipe: Recipe, **more: Any) -> dict[str, Any]:
        """Return the specification for its worker process.

        The fields: those of the job; ``config``, all settings; ``model``, those of the plain ViT,
        for other systems; ``batch_size``; ``device``; and, for workloads that read data,
        ``data_path``, ``reference_path``, ``images`` (test images) and ``folder`` (where the
        reference saves weights and logits, which ours are compared with).
        """
        config = recipe.config(self.precision)
        return {
            **dataclasses.asdict(self),
            "config": to_json(config),
            "model": dataclasses.asdict(plain(config.model)),
            "batch_size": config.training.batch_size,
            **more,
        }


def why_unsupported(system: str, workload: Workload, model: ModelConfig) -> str | None:
    """Return why a peer does not support this shape, or None."""
    if system == REFERENCE and model.forward_mul != int(model.forward_mul):
        return f"needs an integer forward_mul, not {model.forward_mul:g}"
    reads_cifar = workload in ("epoch", "test")
    if reads_cifar and (model.n_channels, model.n_classes or CLASSES) != (3, CLASSES):
        return "loads CIFAR-10 only: 3 channels, 10 classes"
    return None


def jobs_of(
    workload: Workload, precisions: tuple[str, ...], peers: Mapping[str, str | None]
) -> list[Job]:
    """Return the jobs of a workload, peers first: ours reads files that the reference saves.

    The reference's own training and testing loops run unmodified, in float32.
    """
    jobs = []
    for system in (name for name, why_not in peers.items() if why_not is None):
        as_it_ships = workload in ("epoch", "test")
        formats = ("float32",) if as_it_ships else precisions
        jobs += [Job(system, precision, workload) for precision in formats]
    return jobs + [Job(OURS, precision, workload) for precision in precisions]
