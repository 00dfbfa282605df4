"""How a layout is described: rules that map tensors both ways, and settings read off shapes.

Each rule both reads and writes, so the shapes that a file should have follow from the shapes of our
model.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.config.settings import ModelConfig
from vitrail.errors import CheckpointError

State = Mapping[str, Tensor]
Move = Callable[..., tuple[Tensor, ...]]
SHOWN = 3
"""Number of wrong keys in an error message."""
PREPARATION_FLAGS = "delete that file and give --mean, --std, --fit, --interpolation and --crop_pct"
USUAL_HEAD_WIDTH = 64
USUAL_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
"""Published ViTs of these widths have 16 heads; those of other widths have heads of width 64."""


@dataclass(frozen=True)
class Rule:
    """Some of our tensors, some of theirs, and how to convert between them."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Move
    """Their tensors -> ours."""
    write: Move
    """Our tensors -> theirs."""


class Found(NamedTuple):
    """The settings of a state dict, and its tensors under the layout's standard names."""

    config: ModelConfig
    state: State
    notes: list[str]
    """What was assumed, changed or ignored, for the user to read."""
    classes: tuple[str, ...] = ()
    data: dict[str, Any] = {}  # noqa: RUF012  (a NamedTuple's field, never changed)
    """Fields of DataConfig that its files specify."""
    usual: dict[str, Any] = {}  # noqa: RUF012
    """The other system's defaults for fields that its files do not specify."""
    refused: dict[str, str] = {}  # noqa: RUF012
    """Fields of DataConfig whose value in the files Vitrail does not support, and that value."""


class Layout(NamedTuple):
    """How one system names and shapes a Vision Transformer's weights."""

    name: str
    key_pattern: re.Pattern[str]
    """Matches the start of keys that no other layout has."""
    find: Callable[[State, dict[str, Any], int | None], Found]
    """(state, the folder's JSON files by name, requested head count) -> settings and tensors."""
    rules: Callable[[ModelConfig], list[Rule]]
    needs: dict[str, tuple[Any, ...]]
    """Values that settings must have in this layout, besides a patch stem and learned positions."""


def single(ours: str, theirs: str, read: Callable[[Tensor], Tensor], write: Move) -> Rule:
    """Return the rule for one tensor of each side."""
    return Rule((ours,), (theirs,), lambda tensor: (read(tensor),), write)


def same(ours: str, theirs: str) -> list[Rule]:
    """Return the rules for a layer whose weight and bias are equal on both sides."""
    return [
        single(f"{ours}.{part}", f"{theirs}.{part}", lambda t: t, lambda t: (t,))
        for part in ("weight", "bias")
    ]


def stacked(ours: str, theirs: Iterable[str]) -> list[Rule]:
    """Return the rules for a layer of ours that stacks the rows of several of theirs."""
    layers = tuple(theirs)
    return [
        Rule(
            (f"{ours}.{part}",),
            tuple(f"{layer}.{part}" for layer in layers),
            lambda *parts: (torch.cat(parts),),
            lambda whole: whole.chunk(len(layers)),
        )
        for part in ("weight", "bias")
    ]


def class_token(theirs: str) -> Rule:
    """Return the rule for a class token of shape (1, 1, D)."""
    return single("class_token_D", theirs, lambda t: t.flatten(), lambda t: (t[None, None],))


def positions(theirs: str) -> Rule:
    """Return the rule for the patches' position embedding of shape (1, N, D)."""
    return single("position_ND", theirs, lambda t: t.squeeze(0), lambda t: (t[None],))


def tokens(their_class_token: str, their_positions: str) -> Rule:
    """Return the rule for a class token whose own position is the first row of the embedding.

    Only their sum is ever used, so reading adds the position to the token, and writing gives zeros.
    """

    def read(class_11D: Tensor, table_1TD: Tensor) -> tuple[Tensor, Tensor]:
        return class_11D.flatten() + table_1TD[0, 0], table_1TD[0, 1:]

    def write(class_D: Tensor, position_ND: Tensor) -> tuple[Tensor, Tensor]:
        table_TD = torch.cat([torch.zeros_like(class_D)[None], position_ND])
        return class_D[None, None], table_TD[None]

    ours = ("class_token_D", "position_ND")
    return Rule(ours, (their_class_token, their_positions), read, write)


def read_rules(
    rules: list[Rule], state: State, template: State, name: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Convert their tensors to ours; also return the keys that no rule uses.

    Args:
        rules: the layout, for one model.
        state: their tensors.
        template: tensors of our model's shapes; may be on the meta device.
        name: the layout's name.

    Raises:
        CheckpointError: keys are missing or have wrong shapes; it names the first.
    """
    wrong = []
    for rule in rules:
        wanted = rule.write(*(template[ours] for ours in rule.ours))
        for key, tensor in zip(rule.theirs, wanted, strict=True):
            if key not in state:
                wrong.append(f"{key} is missing")
            elif state[key].shape != tensor.shape:
                wrong.append(f"{key} has shape {tuple(state[key].shape)}, not {(*tensor.shape,)}")
    if wrong:
        raise CheckpointError(f"incomplete weights of the layout {name}: {first_few(wrong)}")
    converted: dict[str, Tensor] = {}
    for rule in rules:
        moved = rule.read(*(state[key] for key in rule.theirs))
        converted.update(zip(rule.ours, moved, strict=True))
    known = {key for rule in rules for key in rule.theirs}
    return converted, [key for key in state if key not in known]


def write_rules(rules: list[Rule], weights: State) -> dict[str, Tensor]:
    """Convert our tensors to theirs."""
    written: dict[str, Tensor] = {}
    for rule in rules:
        moved = rule.write(*(weights[name] for name in rule.ours))
        written.update(zip(rule.theirs, (t.contiguous() for t in moved), strict=True))
    return written


def first_few(words: list[str]) -> str:
    """Return the first few words of a list, and how many more there are."""
    more = f" (and {len(words) - SHOWN} more)" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


def shape(state: State, key: str, dimensions: int) -> torch.Size:
    """Return the shape of a tensor that must have the given number of dimensions."""
    if key not in state:
        raise CheckpointError(f"{key} is missing")
    if state[key].ndim != dimensions:
        raise CheckpointError(
            f"{key} has shape {tuple(state[key].shape)}, not {dimensions} dimensions"
        )
    return state[key].shape


def count_layers(state: State, pattern: str) -> int:
    """Return the number of blocks: of different numbers that the pattern captures in the keys."""
    numbers = [int(found[1]) for key in state if (found := re.match(pattern, key))]
    if not numbers:
        raise CheckpointError("no transformer block in it")
    return len(set(numbers))


def square_image(n_patches: int, patch_size: int, key: str) -> int:
    """Return the side of the square image with N patches."""
    side = math.isqrt(n_patches)
    if side * side != n_patches:
        raise CheckpointError(f"{key} has {n_patches} patches: not a square image")
    return side * patch_size


def square_patch(height: int, width: int, key: str) -> int:
    """Return the side of a patch, which must be square."""
    if height != width:
        raise CheckpointError(f"{key} has patches of {height} x {width} pixels: not square")
    return height


def choose_heads(embed_dim: int, asked: int | None, stored: int | None, notes: list[str]) -> int:
    """Return the number of heads, which shapes do not show: stored, requested, or usual.

    Raises:
        CheckpointError: stored and requested differ, or there is neither and no usual number.
    """
    if asked and stored and asked != stored:
        raise CheckpointError(f"it has {stored} attention heads, not {asked}")
    if asked or stored:
        return asked or stored or 0
    heads = USUAL_HEADS.get(embed_dim, embed_dim // USUAL_HEAD_WIDTH)
    if not heads or embed_dim % heads:
        raise CheckpointError(
            f"the file does not specify the number of attention heads (width {embed_dim}): "
            "give n_attention_heads"
        )
    notes.append(f"assumed n_attention_heads {heads}, usual for width {embed_dim}: not in the file")
    return heads


def rgb_values(values: Any, what: str) -> tuple[float, float, float]:
    """Return a value for each of three channels; one value (gray models) is repeated.

    Raises:
        CheckpointError: there are neither three nor one.
    """
    numbers = values if isinstance(values, list | tuple) else [values]
    if len(numbers) not in (1, 3):
        raise CheckpointError(f"{what} has {len(numbers)} values: 1 or 3 are needed")
    red, green, blue = (*map(float, numbers),) * (3 // len(numbers))
    return red, green, blue
