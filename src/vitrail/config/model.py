"""The settings of the Vision Transformer: all that its shapes and its arithmetic follow from."""

from dataclasses import dataclass
from typing import Literal

from vitrail.config.fields import Checked
from vitrail.errors import ConfigError

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
