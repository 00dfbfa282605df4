"""How another library's weights are described: a table of names, and what shapes do not show.

Each table serves reading and writing, so the shapes that a file must have follow from the shapes of
our model. A module here describes one or two libraries; ``convert`` reads and writes their files.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.config.settings import DataConfig, ModelConfig
from vitrail.errors import CheckpointError

State = Mapping[str, Tensor]
Files = dict[str, dict[str, Any]]
"""JSON files by name."""
Names = Mapping[str, tuple[str, ...]]
"""Each of our layers -> the other library's layers whose rows it stacks; ``*``: a block number."""
SHOWN = 3
"""Number of wrong keys in an error message."""
USUAL_HEAD_WIDTH = 64
USUAL_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
"""Published ViTs of these widths have 16 heads; those of other widths have heads of width 64."""
PREPARATION_FLAGS = "delete that file and give --mean, --std, --fit, --interpolation and --crop_pct"


class Converted(NamedTuple):
    """Another library's model: our settings, tensors, and what else its files specify."""

    config: ModelConfig
    """n_classes is 0 if the weights have no head."""
    weights: State
    """By the layout's standard names as ``Layout.find`` returns them, by ours after conversion."""
    notes: list[str]
    """What was assumed, changed or ignored, for the user to read."""
    classes: tuple[str, ...] = ()
    """Class names, if the files contain them."""
    data: Mapping[str, Any] = {}
    """How pictures are prepared: the fields of PREPARATION in the files; all after conversion."""
    usual: Mapping[str, Any] = {}
    """The other library's defaults for fields that its files do not specify."""
    refused: Mapping[str, str] = {}
    """Fields of DataConfig whose value in the files Vitrail does not support, and that value."""
    layout: str = ""
    tensors: int = 0
    """Number of tensors that were read."""
    assumed: tuple[str, ...] = ()
    """The fields of ``data`` that the files do not specify."""
    image_hw: tuple[int, int] | None = None
    """Height and width of the prepared pictures, if not those of the position table."""
    antialias: bool = False
    """Whether the other library resizes positions with antialiasing."""


@dataclass(frozen=True)
class Layout:
    """How one library names and shapes a Vision Transformer's weights."""

    name: str
    key_pattern: re.Pattern[str]
    """Matches the start of keys that no other layout has."""
    find: Callable[[State, dict[str, Any], int | None], Converted]
    """(state, the folder's JSON files by name, requested head count) -> settings and tensors."""
    names: Callable[[ModelConfig], Names]
    """The names of layers with a weight and a bias."""
    class_token: str
    positions: str
    """Name of the table of positions (1, T, D); empty if they are rotary."""
    needs: Mapping[str, tuple[Any, ...]]
    """Values that settings must have in this layout, besides a patch stem and learned positions."""
    registers: str = ""
    """Name of the register tokens (1, R, D); empty if the layout has none."""
    class_row: bool = True
    """Whether a class token has a position of its own, the first row of the table."""
    pack: Callable[[State, ModelConfig], State] = lambda state, _: state
    """Reshapes tensors named as in PyTorch (``LAYER.weight``) to this layout's names and shapes."""
    unpack: Callable[[State], State] = lambda state: state
    """The reverse of ``pack``."""
    describe: Callable[[ModelConfig, DataConfig, tuple[str, ...]], Files] | None = None
    """Returns the JSON files beside the weights; None if a layout is a single file."""

    def to_theirs(self, config: ModelConfig, weights: State) -> dict[str, Tensor]:
        """Convert our tensors to theirs."""
        written: dict[str, Tensor] = {}
        for ours, theirs in _parts(self.names(config), config.n_layers):
            if ours in weights:
                written.update(zip(theirs, weights[ours].chunk(len(theirs)), strict=True))
        if "class_token_D" in weights:
            written[self.class_token] = weights["class_token_D"][None, None]
        if "registers_RD" in weights:
            written[self.registers] = weights["registers_RD"][None]
        if self.positions:
            table_TD = weights["position_ND"]
            if "class_token_D" in weights and self.class_row:
                table_TD = torch.cat([torch.zeros_like(table_TD[:1]), table_TD])
            written[self.positions] = table_TD[None]
        return {key: t.contiguous() for key, t in self.pack(written, config).items()}

    def to_ours(self, config: ModelConfig, state: State, template: State) -> dict[str, Tensor]:
        """Convert their tensors to ours.

        Only the sum of a class token and its position is ever used: it becomes the token.
        ``template`` has tensors of our model's names and shapes, possibly on the meta device.

        Raises:
            CheckpointError: keys are missing, unknown or have wrong shapes; some are named.
        """
        wrong, wanted = [], self.to_theirs(config, template)
        for key, tensor in wanted.items():
            if key not in state:
                wrong.append(f"{key} is missing")
            elif state[key].shape != tensor.shape:
                wrong.append(f"{key} has shape {tuple(state[key].shape)}, not {(*tensor.shape,)}")
        if wrong:
            raise CheckpointError(
                f"incomplete weights of the layout {self.name}: {first_few(wrong)}"
            )
        if unknown := sorted(set(state) - set(wanted)):
            raise CheckpointError(f"keys unknown to layout {self.name}: {first_few(unknown)}")
        plain = self.unpack(state)
        converted = {
            ours: torch.cat([plain[key] for key in theirs])
            for ours, theirs in _parts(self.names(config), config.n_layers)
            if ours in template
        }
        if "class_token_D" in template:
            converted["class_token_D"] = plain[self.class_token].flatten()
        if "registers_RD" in template:
            converted["registers_RD"] = plain[self.registers][0]
        if self.positions:
            table_TD = plain[self.positions][0]
            if "class_token_D" in template and self.class_row:
                token_D, table_TD = table_TD[0], table_TD[1:]
                converted["class_token_D"] = converted["class_token_D"] + token_D
            converted["position_ND"] = table_TD
        return converted


def _parts(names: Names, n_layers: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each of our tensors, and of theirs.

    A name that ends in ``.weight`` is that of a tensor; others are layers with weight and bias.
    """
    for ours, theirs in names.items():
        for number in range(n_layers if "*" in ours else 1):
            for part in ("",) if ours.endswith(".weight") else (".weight", ".bias"):
                keys = [f"{layer}{part}".replace("*", str(number)) for layer in theirs]
                yield f"{ours}{part}".replace("*", str(number)), keys


def block_names(theirs: str, names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return the names of the layers of blocks: ours start with ``blocks.*.``, theirs as given."""
    return {
        f"blocks.*.{ours}": tuple(theirs + layer for layer in layers)
        for ours, layers in names.items()
    }


# --- what shapes show -----------------------------------------------------------------------------


def read_shapes(plain: State, names: Names) -> dict[str, Any]:
    """Return the settings that the shapes of tensors show; all but the image size."""
    stem, mlp = f"{names['stem'][0]}.weight", names["blocks.*.mlp.fc1"][0]
    embed_dim, n_channels, height, width = shape(plain, stem, 4)
    if height != width:
        raise CheckpointError(f"its patches are {height} x {width} pixels: not square")
    block = re.compile(re.escape(mlp.partition("*")[0]) + r"(\d+)\b")
    numbers = {int(found[1]) for key in plain if (found := block.match(key))}
    if not numbers:
        raise CheckpointError("no transformer block in it")
    hidden_dim = shape(plain, f"{mlp.replace('*', '0')}.weight", 2)[0]
    fc2 = plain.get(f"{names['blocks.*.mlp.fc2'][0].replace('*', '0')}.weight")
    gated = fc2 is not None and fc2.ndim == 2 and hidden_dim == 2 * fc2.shape[1]
    (scale,) = names.get("blocks.*.scale1.weight", ("",))
    (head,) = names.get("head.fc2") or names["head"]
    return {
        "n_channels": n_channels,
        "n_classes": len(plain[f"{head}.weight"]) if f"{head}.weight" in plain else 0,
        "patch_size": height,
        "embed_dim": embed_dim,
        "n_layers": len(numbers),
        "forward_mul": hidden_dim / embed_dim / (2 if gated else 1),
        **({"hidden_act": "swiglu"} if gated else {}),
        **({"layer_scale": 1.0} if scale.replace("*", "0") in plain else {}),
    }


def shape(state: State, key: str, dimensions: int) -> torch.Size:
    """Return the shape of a tensor that must have the given number of dimensions."""
    if key not in state:
        raise CheckpointError(f"{key} is missing")
    if state[key].ndim != dimensions:
        raise CheckpointError(
            f"{key} has shape {tuple(state[key].shape)}, not {dimensions} dimensions"
        )
    return state[key].shape


def square_image(n_patches: int, patch_size: int) -> int:
    """Return the side of the square image with N patches."""
    side = math.isqrt(n_patches)
    if side * side != n_patches:
        raise CheckpointError(f"positions of {n_patches} patches: not a square image")
    return side * patch_size


def choose_heads(embed_dim: int, asked: int | None, stored: int | None, notes: list[str]) -> int:
    """Return the number of heads, which shapes do not show: stored, requested, or usual.

    Raises:
        CheckpointError: stored and requested differ, or there is neither and no usual number.
    """
    if asked and stored and asked != stored:
        raise CheckpointError(f"it has {stored} attention heads, not {asked}")
    if heads := asked or stored:
        return heads
    heads = USUAL_HEADS.get(embed_dim, embed_dim // USUAL_HEAD_WIDTH)
    if not heads or embed_dim % heads:
        raise CheckpointError(
            f"the file does not specify the number of attention heads (width {embed_dim}): "
            "give n_attention_heads"
        )
    notes.append(f"assumed n_attention_heads {heads}, usual for width {embed_dim}: not in the file")
    return heads


# --- variants and words ---------------------------------------------------------------------------


def fill_biases(plain: dict[str, Tensor], names: Names, notes: list[str]) -> None:
    """Add zeros for missing biases of queries, keys and values, with a note."""
    layers = "|".join(map(re.escape, names["blocks.*.attention.qkv"])).replace(r"\*", r"\d+")
    filled = []
    for key in list(plain):
        layer = key.removesuffix(".weight")
        if re.fullmatch(layers, layer) and fill_bias(plain, layer):
            filled.append(f"{layer}.bias")
    if filled:
        notes.append(f"{first_few(filled)}: missing, set to zeros")


def fill_bias(plain: dict[str, Tensor], layer: str) -> bool:
    """Add zeros for a missing bias of a layer; return whether it was missing."""
    weight, name = plain.get(f"{layer}.weight"), f"{layer}.bias"
    if weight is None or name in plain:
        return False
    plain[name] = weight.new_zeros(len(weight))
    return True


def merge_heads(
    plain: dict[str, Tensor], names: tuple[str, str], merged: str, notes: list[str]
) -> bool:
    """Replace DeiT's two heads with one that reads both tokens concatenated; return whether it did.

    The mean of two linear layers is one linear layer of their concatenated inputs.
    """
    if not all(f"{name}.weight" in plain for name in names):
        return False
    weights = [plain.pop(f"{name}.weight") for name in names]
    biases = [plain.pop(f"{name}.bias") for name in names]
    plain[f"{merged}.weight"] = torch.cat(weights, dim=1) / 2
    plain[f"{merged}.bias"] = (biases[0] + biases[1]) / 2
    notes.append(f"{' and '.join(names)}: replaced with one head, their mean")
    return True


def rgb_values(values: Any, what: str) -> tuple[float, float, float]:
    """Return a value for each of three channels; one value (gray models) is repeated."""
    numbers = values if isinstance(values, list | tuple) else [values]
    if len(numbers) not in (1, 3):
        raise CheckpointError(f"{what} has {len(numbers)} values: 1 or 3 are needed")
    red, green, blue = (*map(float, numbers),) * (3 // len(numbers))
    return red, green, blue


def channel_values(model: ModelConfig, values: tuple[float, float, float]) -> list[float]:
    """Return mean or std for each of the model's channels; gray models use the average."""
    return [sum(values) / 3] if model.n_channels == 1 else list(values)


def first_few(words: list[str]) -> str:
    """Return the first few words of a list, and how many more there are."""
    more = f" (and {len(words) - SHOWN} more)" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
