"""Every setting of a run, as frozen dataclasses: a field is a flag is a key of the run's JSON.

The names are the reference system's where it has the setting, the field's usual terms otherwise.
A combination that cannot work is refused when it is built, with the remedy.
"""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from vitrail.config.fields import Checked
from vitrail.errors import ConfigError

Split = Literal["train", "validation", "test"]
LARGEST = 1e38
"""No value of a pixel is larger (it is nearly the largest of 32 bits)."""
LIMIT = 1e9
"""No setting but the seed is larger; settings come from strangers, too."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_range(config: object, names: str, low: float, high: float = LIMIT) -> None:
    """Refuse any of these fields that is given and is not from ``low`` to ``high``."""
    wanted = f"at least {low:g}" if high == LIMIT else f"a number from {low:g} to {high:g}"
    for name in names.split():
        value = getattr(config, name)
        require(value is None or low <= value <= high, f"{name} is {value}: give {wanted}")


@dataclass(frozen=True)
class ModelConfig(Checked):
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
    class_token: bool | None = None
    """An extra token that stands for no patch: there if the head reads it, unless given."""
    stem: Literal["patch", "conv"] = "patch"
    """How pixels become tokens: one strided convolution, or white patches and convolutions."""
    stem_channels: tuple[int, ...] = ()
    """Widths of stem conv's 3x3 convolutions: the last one embed_dim wide, unless given."""
    position: Literal["learned", "sincos", "rope"] = "learned"
    """Positions: a learned table, fixed sines and cosines, or rotary in every attention."""
    head: Literal["mlp", "linear"] = "mlp"
    """Classifier: Linear, Tanh, Linear as the reference, or one Linear."""
    fc_norm: bool = False
    """With pool mean, normalise the mean instead of every token before it."""
    hidden_act: Literal["gelu", "gelu_tanh"] = "gelu"
    """The MLP's GELU: exact, or by the tanh formula, as Google's weights want it."""
    layer_norm_eps: float = 1e-5
    """What every LayerNorm adds to the variance: timm's and Google's weights want 1e-6."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "patch_size embed_dim n_layers n_attention_heads", 1)
        require_range(self, "n_classes forward_mul", 0)
        require_range(self, "dropout drop_path", 0, 0.999)
        require(self.n_channels in (1, 3), f"n_channels is {self.n_channels}: give 3 (colour) or 1")
        for side in self.image_hw:
            require(
                side >= 1 and side % self.patch_size == 0,
                f"image_size {side} is not a multiple of patch_size {self.patch_size}: "
                f"give image_size {max(1, round(side / self.patch_size)) * self.patch_size} "
                "or another patch_size",
            )
        few = max(self.image_hw) <= 4096 and self.grid_GJ[0] * self.grid_GJ[1] <= 16_384
        require(few, f"image_size {self.image_size}: more than 4096 pixels or 16,384 patches")
        require(self.layer_norm_eps > 0, f"layer_norm_eps is {self.layer_norm_eps}: above 0")
        require(
            self.pool == "mean" or (self.class_token is not False and not self.fc_norm),
            "pool cls reads a class token and norms it alone: leave out class_token and fc_norm, "
            "or take pool mean",
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
                min(self.image_hw) >= 4,
                f"image_size {self.image_size}: stem conv needs 4 pixels, or take stem patch",
            )
            least = max(1, self.patch_size.bit_length() - 2)
            require(
                len(self.stem_widths) >= least and min(self.stem_widths) >= 1,
                f"stem_channels {self.stem_channels} cannot halve the image down to patches of "
                f"{self.patch_size}: give at least {least} widths",
            )
        else:
            require(not self.stem_channels, "stem_channels are of stem conv: give --stem conv")

    @property
    def has_class_token(self) -> bool:
        """Whether token 0 is a class token and the patches follow."""
        return self.pool == "cls" if self.class_token is None else self.class_token

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
        """Widths of stem conv's convolutions: halved at each step back from embed_dim."""
        convolutions = max(1, self.patch_size.bit_length() - 2)
        halved = (self.embed_dim // 2**step or 1 for step in reversed(range(convolutions)))
        return self.stem_channels or tuple(halved)

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the MLP."""
        return round(self.embed_dim * self.forward_mul)


@dataclass(frozen=True)
class DataConfig(Checked):
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
    """Threads that decode picture files; 0 decodes one at a time, like 1."""
    fit: Literal["crop", "pad", "squash"] = "crop"
    """Fit pictures of another shape by cropping, by padding with black, or by stretching."""
    interpolation: Literal["bilinear", "bicubic", "lanczos", "hamming", "box", "nearest"] = (
        "bilinear"
    )
    """Filter that resizes pictures. All but nearest are antialiased."""
    crop_pct: float = 1.0
    """Share of each side that is kept around the center: 0.875 for 224 of 256 pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel mean taken off, pixels counted 0 to 1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel standard deviation divided by."""
    pixel_range: tuple[float, float] | None = None
    """Values of black and white in 16-bit and floating-point pictures. Default: from all pictures
    of the data set, see the log."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "num_train_images num_test_images", 1)
        require_range(self, "validation_images num_workers", 0)
        self._check_pixels()
        require_range(self, "crop_pct", 0.01, 1)
        require(
            self.fit != "pad" or self.crop_pct == 1,
            f"crop_pct {self.crop_pct:g} cuts off what fit pad would add: leave one out",
        )

    def _check_pixels(self) -> None:
        """Refuse a mean, std or range of pixels that cannot be meant."""
        hint = "pixels are scaled to 0..1: divide by 255"
        for name, values, low in (("mean", self.mean, -1.0), ("std", self.std, 1e-6)):
            most = max(map(abs, values))
            require(
                all(low <= value <= 1 for value in values),
                f"{name} is {values}: {hint if most > 1 else f'give numbers from {low:g} to 1'}",
            )
        if self.pixel_range is not None:
            low, high = self.pixel_range
            require(
                -LARGEST <= low < high <= LARGEST,
                f"pixel_range is {low:g} {high:g}: give the value of black, then a larger one",
            )


class Preparation(TypedDict, total=False):
    """The settings of the data by which any picture becomes what the model reads."""

    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    fit: Literal["crop", "pad", "squash"] | None
    interpolation: Literal["bilinear", "bicubic", "lanczos", "hamming", "box", "nearest"] | None
    crop_pct: float | None
    pixel_range: tuple[float, float] | None


PREPARATION = tuple(Preparation.__annotations__)


@dataclass(frozen=True)
class AugmentConfig(Checked):
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
        super().__post_init__()
        require_range(self, "crop_padding randaugment_ops mixup cutmix", 0)
        require_range(self, "randaugment_magnitude", 0, 30)
        require_range(self, "random_erasing", 0, 1)


@dataclass(frozen=True)
class TrainingConfig(Checked):
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
    """Highest learning rate of Muon for the blocks; the stem's kernels get five times as much."""
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
    """Test and save a moving average of the weights with this decay per update; 0 for none. After
    n updates the decay is at most (1 + n) / (10 + n), so that short runs are averaged, too."""
    init: str = ""
    """Weights to start from: whatever a model can be named by; at random unless given."""
    new_head: bool = False
    """Start from init without its head, for other classes."""
    freeze_backbone: bool = False
    """Train the head alone. Everything else stays as in init, batch norm's statistics included, and
    computes as in evaluation, without dropout."""
    layer_decay: float = 1.0
    """Learning rate of each block as a share of the next one's; 1 for all alike."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the products, Muon's included: auto takes bfloat16 where it is native."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: a minute at the start, faster steps after. auto: on CUDA, for long runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "batch_size epochs accumulate", 1)
        require_range(self, "learning_rate muon_learning_rate", 1e-12)
        require_range(self, "weight_decay minimum_learning_rate clip_norm warmup_epochs", 0)
        require_range(self, "label_smoothing", 0, 0.999)
        require_range(self, "ema_decay", 0, 0.99999999)
        require_range(self, "layer_decay", 1e-6, 1)
        for name in ("new_head", "freeze_backbone"):
            require(
                bool(self.init) or not getattr(self, name),
                f"{name} needs weights to start from: give --init",
            )
        require(
            not self.freeze_backbone or self.layer_decay == 1,
            f"layer_decay {self.layer_decay} has no block to act on with freeze_backbone: leave "
            "one out",
        )
        require(
            self.warmup < self.epochs,
            f"warmup_epochs {self.warmup_epochs} leaves nothing of {self.epochs} epochs: "
            f"give --warmup_epochs {self.epochs / 20:g} or more epochs",
        )
        low, top = self.minimum_learning_rate, self.learning_rate
        require(low <= top, f"minimum_learning_rate {low} is above learning_rate {top}: lower it")
        parts, size = self.accumulate, self.batch_size
        require(parts <= size, f"accumulate {parts} is above batch_size {size}: lower it")

    @property
    def warmup(self) -> float:
        """Warm-up in epochs."""
        return self.epochs / 20 if self.warmup_epochs is None else self.warmup_epochs


@dataclass(frozen=True)
class RunConfig(Checked):
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
    """Also write the best weights to MODEL_PATH/FOLDER_NAME/MODEL_NAME-EPOCH.safetensors, where
    EPOCH, counted from 0, is the epoch they are from."""
    model_name: str = ""
    """Name of that file; unless given, vit-layerL-SIZE-DATASET."""
    monitor: Literal["validation", "test"] = "validation"
    """Split scored after every epoch. test is for repeating published curves; it picks nothing."""
    stop_at_accuracy: float | None = None
    """Stop after the first epoch whose validation accuracy reaches this, a share of 1."""
    checkpoint_epochs: int = 1
    """Save a checkpoint every N epochs, at the end, and after each epoch that is the best so far on
    validation."""
    keep_checkpoints: int = 1
    """Newest checkpoints to keep beside the best one; 0 keeps all."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    wandb: bool = False
    """Log to Weights & Biases as well, by your own installation of wandb and your own account."""
    mlflow: bool = False
    """Log to MLflow as well, by your own installation; MLFLOW_TRACKING_URI says where."""
    attention_epochs: int = 0
    """Draw what the model looks at in eight validation images every so many epochs; 0 never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        goal = self.stop_at_accuracy
        require(
            goal is None or 0 <= goal <= 1,
            f"stop_at_accuracy is {goal}: give a fraction of 1, e.g. 0.9 for 90 %",
        )
        require_range(self, "checkpoint_epochs", 1)
        require_range(self, "keep_checkpoints attention_epochs", 0)
        for name in ("folder_name", "model_name"):
            value = getattr(self, name)
            plain = value in ("", Path(value).name) and value != ".."
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


def complete_config(
    config: Config, classes: tuple[str, ...], pixel_range: tuple[float, float] | None
) -> Config:
    """Return the settings with what the data turned out to be: their classes, their pixel range.

    Raises:
        ConfigError: another number of classes was asked for.
    """
    asked, there = config.model.n_classes, len(classes)
    if asked not in (0, there):
        raise ConfigError(f"n_classes is {asked}, but the data have {there} classes: leave it out")
    data = config.data if pixel_range is None else replace(config.data, pixel_range=pixel_range)
    return replace(config, model=replace(config.model, n_classes=there), data=data)
