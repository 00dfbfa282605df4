"""Tables of names, for both ways: which tensors of ours hold the numbers of which of theirs.

A layout is a list of such rules, so what reads a layout also writes it, and the shapes a file
should have follow from the shapes of our model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.errors import CheckpointError

State = Mapping[str, Tensor]
Move = Callable[..., tuple[Tensor, ...]]
SHOWN = 3
"""How many wrong keys an error names."""


@dataclass(frozen=True)
class Rule:
    """Some of our tensors, some of theirs, and how the numbers move between them."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Move
    """Theirs in, ours out."""
    write: Move
    """Ours in, theirs out."""


def one(ours: str, theirs: str, read: Callable[[Tensor], Tensor], write: Move) -> Rule:
    """Return the rule of one tensor against one."""
    return Rule((ours,), (theirs,), lambda tensor: (read(tensor),), write)


def same(ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a layer whose weight and bias are the same in both."""
    return [
        one(f"{ours}.{part}", f"{theirs}.{part}", lambda t: t, lambda t: (t,))
        for part in ("weight", "bias")
    ]


def stacked(ours: str, theirs: Iterable[str]) -> list[Rule]:
    """Return the rules of a layer of ours that stacks the rows of several of theirs."""
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
    """Return the rule of a class token of shape (1, 1, D)."""
    return one("class_token_D", theirs, lambda t: t.flatten(), lambda t: (t[None, None],))


def positions(theirs: str) -> Rule:
    """Return the rule of a table of the patches' positions, of shape (1, N, D)."""
    return one("position_ND", theirs, lambda t: t.squeeze(0), lambda t: (t[None],))


def tokens(their_class_token: str, their_positions: str) -> Rule:
    """Return the rule of a class token that has a position of its own, the table's first row.

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
    """Return our tensors, read off theirs, and the keys no rule speaks of.

    Args:
        rules: the layout, for one model.
        state: their tensors.
        template: tensors of our model's shapes; they may be without content (meta).
        name: what the layout is called.

    Raises:
        CheckpointError: keys are missing or of other shapes; it names the first.
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
        raise CheckpointError(f"not whole weights of the layout {name}: {first(wrong)}")
    converted: dict[str, Tensor] = {}
    for rule in rules:
        moved = rule.read(*(state[key] for key in rule.theirs))
        converted.update(zip(rule.ours, moved, strict=True))
    known = {key for rule in rules for key in rule.theirs}
    return converted, [key for key in state if key not in known]


def write_rules(rules: list[Rule], weights: State) -> dict[str, Tensor]:
    """Return their tensors, written from ours."""
    written: dict[str, Tensor] = {}
    for rule in rules:
        moved = rule.write(*(weights[name] for name in rule.ours))
        written.update(zip(rule.theirs, (t.contiguous() for t in moved), strict=True))
    return written


def first(words: list[str]) -> str:
    """Return the first few of a list as words, and how many more there are."""
    more = f" (and {len(words) - SHOWN} more)" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
