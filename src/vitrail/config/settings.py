"""All settings of a run, as frozen dataclasses: each field is also a flag and a key in JSON.

Names follow the reference implementation where it has the setting, and common usage otherwise.
Combinations that cannot work raise ConfigError, with the remedy, on construction.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from vitrail.config.files import Checked
from vitrail.errors import ConfigError

Split = Literal["train", "validation", "test"]
Dataset = Literal["shapes", "cifar10", "cifar100", "folder", "idx", "npz", "hf"]
ARRAYS: tuple[Dataset, ...] = ("idx", "npz", "hf")  # see data/arrays.py
FitMode = Literal["crop", "pad", "squash"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "hamming", "box", "nearest"]
MAX_PIXEL = 1e38
"""Largest value of a pixel (nearly the largest in float32)."""
MAX_SETTING = 1e9
"""Largest value of any setting but the seed; settings can come from untrusted files."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_range(config: object, names: str, low: float, high: float = MAX_SETTING) -> None:
    """Raise ConfigError if one of these fields is neither None nor between ``low`` and ``high``."""
    wanted = f"at least {low:g}" if high == MAX_SETTING else f"a number from {low:g} to {high:g}"
    for name in names.split():
        value = getattr(config, name)
        require(value is None or low <= value <= high, f"{name} is {value}: give {wanted}")


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The model."""

    image_size: int | tuple[int, int] = 32
    """Side of the image in pixels, or its height and width."""
    n_channels: int = 3
    """3 for color, 1 for grayscale."""
    n_classes: int = 0
    """Number of classes; 0 takes it from the dataset. (A network with 0 classes has no head.)"""
    patch_size: int = 4
    """Side of one square patch in pixels."""
    embed_dim: int = 128
    """Width of a token vector."""
    n_layers: int = 6
    """Number of transformer blocks."""
    n_attention_heads: int = 4
    """Attention heads in each block."""
    forward_mul: float = 2.0
    """Hidden width of the MLP, as a multiple of embed_dim."""
    dropout: float = 0.1
    """Dropout probability after the embedding, the attention and the MLP."""
    drop_path: float = 0.0
    """Stochastic depth: probability of skipping a branch, rising from 0 in the first block to this
    in the last."""
    pool: Literal["cls", "mean", "cls_mean", "cls_register"] = "cls"
    """Input of the head: the class token, the mean of the patch tokens, both concatenated, or
    the class token concatenated with the first register (DeiT's distillation token)."""
    class_token: bool | None = None
    """Prepend a class token. Default: yes, unless pool is mean."""
    n_registers: int = 0
    """Register tokens between the class token and the patches: learned, with no position."""
    stem: Literal["patch", "conv"] = "patch"
    """Patch embedding: one strided convolution, or whitened patches and convolutions."""
    stem_channels: tuple[int, ...] = ()
    """Widths of the 3x3 convolutions of stem conv. Default: doubling up to embed_dim."""
    stem_pools: tuple[int, ...] = ()
    """Numbers, from 1, of the convolutions of stem conv that are followed by max pooling, which
    halves the image. Default: the first ones."""
    position: Literal["learned", "sincos", "rope", "rope_centered"] = "learned"
    """Position encoding: a learned table, fixed sines and cosines, or rotary (in every block), with
    patch indices (rope) or coordinates from -1 to 1 (rope_centered, for DINOv3's weights)."""
    head: Literal["mlp", "linear"] = "mlp"
    """Classifier: Linear, Tanh, Linear (as in the reference), or one Linear."""
    fc_norm: bool = False
    """With pool mean, apply the last LayerNorm to the mean instead of to every token."""
    pre_norm: bool = False
    """An extra LayerNorm before the first block (for CLIP's weights)."""
    layer_scale: float = 0.0
    """LayerScale: initial value of the learned scale of each block's two branches; 0 for none."""
    hidden_act: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    """Activation in the MLP: GELU, its tanh or sigmoid approximation (for Google's and CLIP's
    weights), or SwiGLU, which multiplies two halves of a layer twice as wide."""
    init_std: float = 0.02
    """Standard deviation of the initial weights of linear layers."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm (1e-6 for weights of timm and Google)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "patch_size embed_dim n_layers n_attention_heads", 1)
        require_range(self, "n_classes forward_mul n_registers layer_scale", 0)
        require_range(self, "dropout drop_path", 0, 0.999)
        require(self.n_channels in (1, 3), f"n_channels is {self.n_channels}: give 3 (color) or 1")
        for side in self.image_hw:
            require(
                side >= 1 and side % self.patch_size == 0,
                f"image_size {side} is not a multiple of patch_size {self.patch_size}: "
                f"give image_size {max(1, round(side / self.patch_size)) * self.patch_size} "
                "or another patch_size",
            )
        few = max(self.image_hw) <= 4096 and self.n_patches <= 16_384
        require(few, f"image_size {self.image_size}: over 4096 pixels per side or 16,384 patches")
        for name in ("layer_norm_eps", "init_std"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: give more than 0")
        require(
            self.pool == "mean" or (self.class_token is not False and not self.fc_norm),
            f"pool {self.pool} needs the class token and does not support fc_norm: leave out "
            "class_token and fc_norm, or give pool mean",
        )
        found = self.pool != "cls_register" or self.n_registers > 0
        require(found, "pool cls_register needs a register: give n_registers 1, or another pool")
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
            f"forward_mul {self.forward_mul} gives the MLP no hidden units: raise it",
        )
        if self.is_rotary:
            require(
                (width // heads) % 4 == 0,
                f"position {self.position} needs a head width divisible by 4, not {width // heads} "
                f"(embed_dim {width} / {heads} heads): "
                f"give embed_dim {heads * 4 * max(1, round(width / heads / 4))}",
            )
        if self.position == "sincos":
            require(
                width % 4 == 0,
                f"position sincos needs embed_dim divisible by 4, not {width}: "
                f"give {width // 4 * 4 or 4}",
            )
        self._check_stem()

    def _check_stem(self) -> None:
        if self.stem == "conv":
            halvings, widths = self.patch_size.bit_length() - 1, self.stem_widths
            require(
                halvings > 0 and self.patch_size == 2**halvings,
                f"stem conv halves the image step by step: patch_size {self.patch_size} "
                "must be a power of two, at least 2; or give stem patch",
            )
            require(
                min(self.image_hw) >= 3,
                f"image_size {self.image_size}: stem conv needs at least 3 pixels per side: "
                "enlarge it, or give stem patch",
            )
            require(
                len(widths) >= halvings and min(widths) >= 1,
                f"stem_channels {widths} cannot halve the image down to patches of "
                f"{self.patch_size}: give at least {halvings} widths",
            )
            require(
                len(set(self.pools) & set(range(1, len(widths) + 1)))
                == len(self.pools)
                == halvings,
                f"stem_pools {self.pools}: give {halvings} different numbers from 1 to "
                f"{len(widths)} to halve the image down to patches of {self.patch_size}",
            )
        else:
            for name in ("stem_channels", "stem_pools"):
                unused = not getattr(self, name)
                require(unused, f"{name} needs --stem conv: give that, or an empty --{name}")

    @property
    def has_class_token(self) -> bool:
        """Whether token 0 is a class token."""
        return self.pool != "mean" if self.class_token is None else self.class_token

    @property
    def is_rotary(self) -> bool:
        """Whether positions are rotations of queries and keys, instead of an added table."""
        return self.position in ("rope", "rope_centered")

    @property
    def n_prefix_tokens(self) -> int:
        """Number of tokens before the patches: a class token and the registers."""
        return int(self.has_class_token) + self.n_registers

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid_GJ(self) -> tuple[int, int]:
        """Number of patch rows and patch columns."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def n_patches(self) -> int:
        """Number of patches of an image."""
        return self.grid_GJ[0] * self.grid_GJ[1]

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Widths of the convolutions of stem conv. Default: doubling up to embed_dim."""
        halved = (self.embed_dim // 2**step or 1 for step in range(self.patch_size.bit_length()))
        return self.stem_channels or tuple(halved)[::-1]

    @property
    def pools(self) -> tuple[int, ...]:
        """Numbers of the convolutions of stem conv that are followed by max pooling."""
        return self.stem_pools or tuple(range(1, self.patch_size.bit_length()))

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the MLP."""
        return round(self.embed_dim * self.forward_mul)

    @property
    def pooled_dim(self) -> int:
        """Width of the head's input."""
        return self.embed_dim if self.pool in ("cls", "mean") else 2 * self.embed_dim


@dataclass(frozen=True)
class DataConfig(Checked):
    """The dataset."""

    dataset: Dataset = "shapes"
    """shapes is generated; folder: one subfolder of images per class in data_path; idx: IDX
    files such as MNIST's; npz: arrays such as MedMNIST's; hf: Parquet, Arrow, or hf:OWNER/NAME."""
    data_path: Path = Path("data")
    """Folder or file of the dataset. CIFAR is looked up here, then in the user's cache."""
    shortcut: float = 0.0
    """Fraction of the images of shapes that get a mark in the corner whose color reveals the class,
    to test whether explanations find what a model uses."""
    validation_images: int | None = None
    """Training images held out for validation (stratified, always the same). 0 for none.
    Default: 10%."""
    num_train_images: int | None = None
    """Use only N training images (stratified, always the same ones)."""
    num_test_images: int | None = None
    """Use only N test images (stratified, always the same ones)."""
    num_workers: int = 2
    """Number of threads that decode image files; 0 is the same as 1."""
    fit: FitMode = "crop"
    """How to fit images whose shape differs from the model's: crop, pad with black, or stretch."""
    interpolation: Interpolation = "bilinear"
    """Filter for resizing images. All but nearest are antialiased."""
    crop_pct: float = 1.0
    """Fraction of each side to keep around the center, e.g. 0.875 for 224 of 256 pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel mean to subtract, with pixels scaled to 0..1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel standard deviation to divide by."""
    pixel_range: tuple[float, float] | None = None
    """Values of black and white in 16-bit and floating-point images. Default: derived from all
    images of the dataset and logged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "num_train_images num_test_images", 1)
        require_range(self, "validation_images num_workers", 0)
        self._check_pixels()
        require_range(self, "shortcut", 0, 1)
        require(
            self.shortcut == 0 or self.dataset == "shapes",
            f"shortcut applies to dataset shapes only, not to {self.dataset}: leave it out",
        )
        require_range(self, "crop_pct", 0.01, 1)
        require(
            self.fit != "pad" or self.crop_pct == 1,
            f"crop_pct {self.crop_pct:g} crops what fit pad would add: give crop_pct 1, or "
            "another fit",
        )

    def _check_pixels(self) -> None:
        """Check mean, std and pixel_range, e.g. for values on the scale 0..255."""
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
                -MAX_PIXEL <= low < high <= MAX_PIXEL,
                f"pixel_range is {low:g} {high:g}: give black, then a larger value for white",
            )


class Preparation(TypedDict, total=False):
    """How an image becomes the model's input; DataConfig has the same settings."""

    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    fit: FitMode | None
    interpolation: Interpolation | None
    crop_pct: float | None
    pixel_range: tuple[float, float] | None


PREPARATION = tuple(Preparation.__annotations__)


@dataclass(frozen=True)
class AugmentConfig(Checked):
    """Data augmentation."""

    crop_padding: int = 4
    """Random crop after padding with N black pixels on each side; 0 for none."""
    flip: Literal["random", "alternating", "none"] = "random"
    """Horizontal flip: at random, or each image in every other epoch."""
    randaugment_ops: int = 0
    """RandAugment operations per image; 0 for none."""
    randaugment_magnitude: int = 9
    """RandAugment magnitude, 0 to 30."""
    random_erasing: float = 0.0
    """Probability of erasing a random rectangle."""
    mixup: float = 0.0
    """Parameter alpha of mixup; 0 for none."""
    cutmix: float = 0.0
    """Parameter alpha of CutMix; 0 for none. With mixup, each batch uses one of the two."""
    mix_probability: float = 1.0
    """Fraction of the batches that mixup or CutMix apply to."""
    mix_until: float = 1.0
    """Fraction of the run after which mixup and CutMix stop."""
    strong_until: float = 1.0
    """Fraction of the run after which RandAugment and random erasing stop."""
    patch_drop: float = 0.0
    """Fraction of the batches in which random patches of each image are replaced by its mean color
    or by a blurred copy, as when explanations are scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "crop_padding randaugment_ops mixup cutmix", 0)
        require_range(self, "randaugment_magnitude", 0, 30)
        require_range(
            self, "random_erasing mix_probability mix_until strong_until patch_drop", 0, 1
        )


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """Training."""

    batch_size: int = 128
    """Images per update."""
    epochs: int = 200
    """Passes over the training set."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW. With optimizer muon, biases and norm weights use five
    times this rate."""
    warmup_epochs: float | None = None
    """Epochs of linear learning-rate warm-up; 0 for none. Default: 5% of the epochs."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Learning-rate decay after the warm-up."""
    minimum_learning_rate: float = 1e-5
    """Final learning rate."""
    schedule_by: Literal["step", "epoch"] = "step"
    """Change the learning rate at every update, or once per epoch (as in the reference)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the weight matrices of the blocks and the stem, AdamW for the rest."""
    muon_learning_rate: float = 0.05
    """Peak learning rate of Muon: the size of an update as a fraction of the weight's norm. With
    pretrained weights the default is at most 0.01."""
    weight_decay: float = 1e-3
    """Decoupled weight decay of AdamW. (Muon keeps the norms of its weights constant instead.)"""
    decay: Literal["matrices", "all"] = "matrices"
    """Apply weight decay to weight matrices only, or to all weights (as in the reference)."""
    label_smoothing: float = 0.0
    """Label smoothing: fraction of the target spread evenly over all classes."""
    clip_norm: float = 0.0
    """Maximum norm of the gradient; 0 for no clipping."""
    accumulate: int = 1
    """Split each batch into N parts and accumulate their gradients, to save memory."""
    ema_decay: float = 0.0
    """Evaluate and save an exponential moving average of the weights, with this decay per update;
    0 for none. After n updates the decay is at most (1 + n) / (10 + n), for short runs."""
    init: str = ""
    """Pretrained weights: run folder, file, bundled model or hf:OWNER/NAME. Default: random."""
    new_head: bool = False
    """Replace the head of the pretrained weights with a new one, for other classes."""
    freeze_backbone: bool = False
    """Train the head only. The rest stays in evaluation mode: no dropout, and batch-norm statistics
    are not updated."""
    layer_decay: float = 1.0
    """Learning rate of each block as a fraction of the next block's; 1 for equal rates."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of matrix products, including Muon's. auto: bfloat16 where it is faster
    than float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: a minute at the start, then faster steps. auto: for long runs on CUDA."""

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
            f"layer_decay {self.layer_decay} has no effect with freeze_backbone: leave one out",
        )
        require(
            self.warmup < self.epochs,
            f"warmup_epochs is {self.warmup_epochs}, but training has {self.epochs} epochs: "
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
    """Seed of all random numbers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if available, else mps, else cpu."""
    output_path: Path = Path("output")
    """Folder in which run folders are created."""
    folder_name: str = ""
    """Name of the run folder. Default: the name of the preset, numbered if it exists."""
    model_path: Path | None = None
    """Also write the best weights to MODEL_PATH/FOLDER_NAME/MODEL_NAME-EPOCH.safetensors, where
    EPOCH, counted from 0, is their epoch."""
    model_name: str = ""
    """Name of that file. Default: vit-layerL-SIZE-DATASET."""
    monitor: Literal["validation", "test"] = "validation"
    """Split to evaluate after every epoch. test is only for the curve, as in published ones; the
    best epoch is never chosen on it."""
    stop_at_accuracy: float | None = None
    """Stop after the first epoch whose validation accuracy reaches this fraction, e.g. 0.9."""
    checkpoint_epochs: int = 1
    """Save a checkpoint every N epochs, at the end, and whenever the validation result improves."""
    keep_checkpoints: int = 1
    """Number of newest checkpoints to keep in addition to the best one; 0 keeps all."""
    tensorboard: bool = False
    """Write TensorBoard events to the run folder."""
    wandb: bool = False
    """Also log to Weights & Biases (wandb must be installed)."""
    mlflow: bool = False
    """Also log to MLflow (mlflow must be installed), at MLFLOW_TRACKING_URI."""
    attention_epochs: int = 0
    """Plot attention maps of eight validation images every N epochs; 0 for never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        goal = self.stop_at_accuracy
        fraction = goal is None or 0 <= goal <= 1
        require(fraction, f"stop_at_accuracy is {goal}: give a fraction, e.g. 0.9 for 90%")
        require_range(self, "checkpoint_epochs", 1)
        require_range(self, "keep_checkpoints attention_epochs", 0)
        for name in ("folder_name", "model_name"):
            value = getattr(self, name)
            plain = value in ("", Path(value).name) and value != ".."
            require(plain, f"{name} is {value!r}: give a name without folders")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def flat(self) -> dict[str, Any]:
        """Return all settings in one dictionary; no two sections share a name."""
        sections = dataclasses.asdict(self)
        return {name: value for section in sections.values() for name, value in section.items()}
