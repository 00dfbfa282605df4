"""What the shapes of a state dict tell of its model."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vitrail.config.settings import ModelConfig
from vitrail.errors import CheckpointError
from vitrail.weights.formats.rules import Rule, State

WAY_OUT = "without that file, --mean, --std, --fit, --interpolation and --crop_pct say it"
USUAL_HEAD_WIDTH = 64
USUAL_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
"""Published ViTs of these widths have 16 heads; of other widths, heads of width 64."""


class Found(NamedTuple):
    """What a state dict was found to be, its keys brought to the layout's plain form."""

    config: ModelConfig
    state: State
    notes: list[str]
    """What was assumed, changed or left out, for the user to read."""
    classes: tuple[str, ...] = ()
    data: dict[str, Any] = {}  # noqa: RUF012  (a NamedTuple's field, never changed)
    """Fields of DataConfig that its files say."""
    usual: dict[str, Any] = {}  # noqa: RUF012
    """Values of such fields that the other system assumes where its files do not say them."""
    refused: dict[str, str] = {}  # noqa: RUF012
    """Fields of DataConfig whose value in the files Vitrail does not have, and what it is."""


class Layout(NamedTuple):
    """How one system lays out a Vision Transformer's weights."""

    name: str
    signs: re.Pattern[str]
    """Matches the start of keys that no other layout has."""
    find: Callable[[State, dict[str, Any], int | None], Found]
    """(state, the folder's JSON files by name, heads asked for) -> what it is."""
    rules: Callable[[ModelConfig], list[Rule]]
    needs: dict[str, tuple[Any, ...]]
    """Settings a model must have to be written in this layout."""


def shape(state: State, key: str, dimensions: int) -> torch.Size:
    """Return the shape of one tensor that must have so many dimensions."""
    if key not in state:
        raise CheckpointError(f"{key} is missing")
    if state[key].ndim != dimensions:
        raise CheckpointError(
            f"{key} has shape {tuple(state[key].shape)}, not {dimensions} dimensions"
        )
    return state[key].shape


def count_layers(state: State, pattern: str) -> int:
    """Return the number of blocks: how many numbers the pattern captures in the keys."""
    numbers = [int(found[1]) for key in state if (found := re.match(pattern, key))]
    if not numbers:
        raise CheckpointError("no transformer block in it")
    return len(set(numbers))


def square_image(n_patches: int, patch_size: int, key: str) -> int:
    """Return the side of the square image that has so many patches."""
    side = math.isqrt(n_patches)
    if side * side != n_patches:
        raise CheckpointError(f"{key} has {n_patches} patches: not a square image")
    return side * patch_size


def square_patch(height: int, width: int, key: str) -> int:
    """Return the side of a patch, which must be square."""
    if height != width:
        raise CheckpointError(f"{key} has patches of {height} x {width} pixels: not square")
    return height


def choose_heads(embed_dim: int, asked: int | None, told: int | None, notes: list[str]) -> int:
    """Return the number of heads, which shapes do not tell: as told or asked, or the usual one.

    Raises:
        CheckpointError: another is told than asked, or neither and there is no usual one.
    """
    if asked and told and asked != told:
        raise CheckpointError(f"it has {told} attention heads, not {asked}")
    if asked or told:
        return asked or told or 0
    heads = USUAL_HEADS.get(embed_dim, embed_dim // USUAL_HEAD_WIDTH)
    if not heads or embed_dim % heads:
        raise CheckpointError(
            f"the file does not tell how many attention heads share its width of {embed_dim}: "
            "give n_attention_heads"
        )
    notes.append(
        f"n_attention_heads {heads} is assumed, as usual for width {embed_dim}: the file does not "
        "tell it"
    )
    return heads


def forward_mul(hidden_dim: int, embed_dim: int) -> float:
    """Return the ratio from which the settings work out the hidden width again."""
    return hidden_dim / embed_dim


def three(values: Any, what: str) -> tuple[float, float, float]:
    """Return a value for each of three channels; gray models have one for all.

    Raises:
        CheckpointError: there are neither three nor one.
    """
    numbers = values if isinstance(values, list | tuple) else [values]
    if len(numbers) not in (1, 3):
        raise CheckpointError(f"{what} has {len(numbers)} values: 1 or 3 are needed")
    red, green, blue = (*map(float, numbers),) * (3 // len(numbers))
    return red, green, blue
