"""Every setting of a run, as frozen dataclasses: a field is a flag is a key of the run's JSON.

The names are the reference system's where it has the setting, the field's usual terms otherwise.
A combination that cannot work is refused when it is built, with the remedy.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitrine.errors import ConfigError

Split = Literal["train", "validation", "test"]


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_range(config: object, names: str, low: float, high: float = math.inf) -> None:
    """Refuse any of these fields that is given and is not from ``low`` to ``high``."""
    wanted = f"at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
    for name in names.split():
        value = getattr(config, name)
        require(value is None or low <= value <= high, f"{name} is {value}: give {wanted}")


@dataclass(frozen=True)
class ModelConfig:
    """The Vision Transformer."""

    image_size: int | tuple[int, int] = 32
    """Side of the image in pixels, or its height and width."""
    n_channels: int = 3
    """3 for colour, 1 for gray."""
    n_classes: int = 0
    """Number of classes; 0 takes as many as the data have."""
    patch_size: int = 4
    """Side of one square patch in pixels."""
    embed_dim: int = 128
    """Width of a token."""
    n_layers: int = 6
    """Number of transformer blocks."""
    n_attention_heads: int = 4
    """Attention heads in each block."""
    forward_mul: float = 2.0
    """Hidden width of the MLP, as a multiple of embed_dim."""
    dropout: float = 0.1
    """Dropout probability after the embedding, the attention and the MLP."""
    drop_path: float = 0.0
    """Stochastic depth: probability of skipping a branch, from 0 in the first block to this."""
    pool: Literal["cls", "mean"] = "cls"
    """What the head reads: a class token, or the mean of the patch tokens."""
    stem: Literal["patch", "conv"] = "patch"
    """How pixels become tokens: one strided convolution, or overlapping 3x3 convolutions."""
    stem_channels: tuple[int, ...] = ()
    """Widths of stem conv's convolutions; one a halving, the last embed_dim wide, unless given."""
    position: Literal["learned", "sincos", "rope"] = "learned"
    """Positions: a learned table, fixed sines and cosines, or rotary in every attention."""
    head: Literal["mlp", "linear"] = "mlp"
    """Classifier: Linear, Tanh, Linear as the reference, or one Linear."""

    def __post_init__(self) -> None:
        require_range(self, "patch_size embed_dim n_layers n_attention_heads", 1)
        require_range(self, "n_classes", 0)
        require_range(self, "dropout drop_path", 0, 0.999)
        require(self.n_channels in (1, 3), f"n_channels is {self.n_channels}: give 3 (colour) or 1")
        for side in self.image_hw:
            require(
                side >= 1 and side % self.patch_size == 0,
                f"image_size {side} is not a multiple of patch_size {self.patch_size}: "
                f"give image_size {max(1, round(side / self.patch_size)) * self.patch_size} "
                "or another patch_size",
            )
        self._check_widths()

    def _check_widths(self) -> None:
        width, heads = self.embed_dim, self.n_attention_heads
        require(
            width % heads == 0,
            f"embed_dim {width} is not a multiple of n_attention_heads {heads}: "
            f"give embed_dim {max(1, round(width / heads)) * heads} or another number of heads",
        )
        require(
            self.hidden_dim >= 1,
            f"forward_mul {self.forward_mul} leaves the MLP no hidden unit: raise it",
        )
        if self.position == "rope":
            require(
                (width // heads) % 4 == 0,
                f"position rope needs a head width divisible by 4, not {width // heads} "
                f"(embed_dim {width} / {heads} heads): "
                f"give embed_dim {heads * 4 * max(1, round(width / heads / 4))}",
            )
        if self.position == "sincos":
            require(
                width % 4 == 0,
                f"position sincos needs embed_dim divisible by 4, not {width}: "
                f"give {width // 4 * 4 or 4}",
            )
        if self.stem == "conv":
            require(
                self.patch_size in (2, 4, 8, 16),
                f"stem conv halves the image step by step: patch_size {self.patch_size} "
                "must be 2, 4, 8 or 16, or take stem patch",
            )
            require(
                len(self.stem_widths) >= self.patch_size.bit_length() - 1
                and min(self.stem_widths) >= 1,
                f"stem_channels {self.stem_channels} cannot halve the image down to patches of "
                f"{self.patch_size}: give at least {self.patch_size.bit_length() - 1} widths",
            )
        else:
            require(not self.stem_channels, "stem_channels are of stem conv: give --stem conv")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    @property
    def grid_GJ(self) -> tuple[int, int]:
        """Patch rows and patch columns."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Widths of the convolutions of stem conv: half as wide at each step back from embed_dim."""
        halvings = self.patch_size.bit_length() - 1
        halved = (self.embed_dim // 2**step or 1 for step in reversed(range(halvings)))
        return self.stem_channels or tuple(halved)

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.embed_dim * self.forward_mul)


@dataclass(frozen=True)
class DataConfig:
    """The data."""

    dataset: Literal["shapes", "cifar10", "cifar100", "folder"] = "shapes"
    """shapes is drawn on the spot; folder is class-named folders of pictures under data_path."""
    data_path: Path = Path("data")
    """Where the data are, or are downloaded to."""
    validation_images: int | None = None
    """Training images kept back, stratified, always the same: a tenth unless given, 0 for none."""
    num_train_images: int | None = None
    """Train on the first so many training images only."""
    num_test_images: int | None = None
    """Test on the first so many test images only."""
    num_workers: int = 2
    """Threads that decode picture files."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """How a picture that is not of the model's shape is made so."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel mean taken off, pixels counted 0 to 1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel standard deviation divided by."""

    def __post_init__(self) -> None:
        require_range(self, "num_train_images num_test_images num_workers", 1)
        require_range(self, "validation_images", 0)
        require(min(self.std) > 0, f"std is {self.std}: every value must be above 0")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images."""

    crop_padding: int = 4
    """Random crop after padding by so many black pixels; 0 for none."""
    flip: bool = True
    """Mirror left-right with probability one half."""
    randaugment_ops: int = 0
    """RandAugment operations on each image; 0 for none."""
    randaugment_magnitude: int = 9
    """RandAugment's strength, 0 to 30."""
    random_erasing: float = 0.0
    """Probability of erasing a random rectangle."""
    mixup: float = 0.0
    """Mixup's Beta parameter; 0 for none."""
    cutmix: float = 0.0
    """CutMix's Beta parameter; 0 for none; with mixup too, each batch takes one of the two."""

    def __post_init__(self) -> None:
        require_range(self, "crop_padding randaugment_ops mixup cutmix", 0)
        require_range(self, "randaugment_magnitude", 0, 30)
        require_range(self, "random_erasing", 0, 1)


@dataclass(frozen=True)
class TrainingConfig:
    """How the weights are learnt."""

    batch_size: int = 128
    """Images in one update."""
    epochs: int = 200
    """Passes over the training images."""
    learning_rate: float = 5e-4
    """Highest learning rate of AdamW."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises: a twentieth of them unless given, 0 for none."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls after the warm-up."""
    minimum_learning_rate: float = 1e-5
    """Learning rate at the end."""
    schedule_by: Literal["step", "epoch"] = "step"
    """Change the learning rate at every update, or once an epoch as the reference does."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon trains the matrices of the blocks and the stem with Muon, the rest with AdamW."""
    muon_learning_rate: float = 0.02
    """Highest learning rate of Muon; it follows the same schedule."""
    weight_decay: float = 1e-3
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: weight matrices, or everything as the reference does."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 for no clipping."""
    accumulate: int = 1
    """Parts a batch is cut into, one backward pass each, to save memory."""
    ema_decay: float = 0.0
    """Decay per update of the average of the weights that is tested and saved; 0 for none."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 autocast where the hardware multiplies it natively."""
    compile: bool = False
    """Compile the model with torch.compile (a minute at the start, faster steps after)."""

    def __post_init__(self) -> None:
        require_range(self, "batch_size epochs accumulate", 1)
        require_range(self, "learning_rate muon_learning_rate", 1e-12)
        require_range(self, "weight_decay minimum_learning_rate clip_norm warmup_epochs", 0)
        require_range(self, "label_smoothing", 0, 0.999)
        require_range(self, "ema_decay", 0, 0.99999999)
        require(
            self.warmup < self.epochs,
            f"warmup_epochs {self.warmup_epochs} leaves nothing of {self.epochs} epochs: "
            f"give --warmup_epochs {self.epochs / 20:g} or more epochs",
        )
        require(
            self.minimum_learning_rate <= self.learning_rate,
            f"minimum_learning_rate {self.minimum_learning_rate} is above "
            f"learning_rate {self.learning_rate}: lower it",
        )
        require(
            self.accumulate <= self.batch_size,
            f"accumulate {self.accumulate} leaves parts of a batch of {self.batch_size} empty: "
            "lower it",
        )

    @property
    def warmup(self) -> float:
        """Warm-up in epochs."""
        return self.epochs / 20 if self.warmup_epochs is None else self.warmup_epochs


@dataclass(frozen=True)
class RunConfig:
    """The run and its folder."""

    seed: int = 1234
    """Everything random is a function of it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes cuda, then mps, then cpu."""
    output_path: Path = Path("output")
    """Folder of the run folders."""
    folder_name: str = ""
    """Name of the run folder; unless given, the preset's name, numbered if it is taken."""
    model_path: Path | None = None
    """Also write the final weights to MODEL_PATH/FOLDER_NAME/MODEL_NAME-EPOCH.safetensors."""
    model_name: str = ""
    """Name of that file; unless given, vit-layerL-SIZE-DATASET."""
    monitor: Literal["validation", "test"] = "validation"
    """Split scored after every epoch. test is for repeating published curves; it picks nothing."""
    checkpoint_epochs: int = 1
    """Save a checkpoint every so many epochs (and at the end)."""
    keep_checkpoints: int = 1
    """Newest checkpoints to keep beside the best one; 0 keeps all."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""

    def __post_init__(self) -> None:
        require_range(self, "checkpoint_epochs", 1)
        require_range(self, "keep_checkpoints", 0)
        for name in ("folder_name", "model_name"):
            value = getattr(self, name)
            plain = value == Path(value).name or value == ""
            require(plain, f"{name} is {value!r}: give a plain name, no path")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def flat(self) -> dict[str, Any]:
        """Return all fields in one dictionary; no name is in two sections."""
        sections = dataclasses.asdict(self)
        return {name: value for section in sections.values() for name, value in section.items()}
