"""Stratified splits and subsets: how many items of each class, and which. No torch is imported.

Which items are chosen depends on a rank of each item alone (a hash, or its place in a fixed random
order), never on the order of the items.
"""

from collections.abc import Sequence
from typing import Any

from vitrail.errors import ConfigError

HELD_OUT = 10
"""One in this many images is held out for validation and, if there are no splits, for test."""


def shares(counts: Sequence[int], wanted: int) -> list[int]:
    """Return how many of each class to take for ``wanted`` in all: its exact share, within one."""
    total = sum(counts)
    parts = [count * wanted // total for count in counts]
    # The remainder goes to the largest fractions, among equal ones to the first.
    order = sorted(range(len(counts)), key=lambda index: -(counts[index] * wanted % total))
    for index in order[: wanted - sum(parts)]:
        parts[index] += 1
    return parts


def validation_shares(counts: Sequence[int], validation_images: int | None) -> list[int]:
    """Return how many images of each class are held out for validation. Default: a tenth in all.

    Raises:
        ConfigError: no image would be left to train on.
    """
    total = sum(counts)
    wanted = total // HELD_OUT if validation_images is None else validation_images
    if wanted >= total:
        raise ConfigError(
            f"validation_images is {wanted}, but there are {total} training images: give fewer"
        )
    return shares(counts, wanted)


def tenth_of_each(counts: Sequence[int]) -> list[int]:
    """Return a tenth of each class: at least one, but not the only item of a class."""
    return [min(n - 1, max(1, round(n / HELD_OUT))) if n else 0 for n in counts]


def choose(labels: Sequence[int], counts: Sequence[int], ranks: Sequence[Any]) -> list[int]:
    """Return the indices of each class's ``counts`` items of lowest rank, in ascending order."""
    left, chosen = list(counts), []
    for index in sorted(range(len(labels)), key=ranks.__getitem__):
        if left[labels[index]] > 0:
            left[labels[index]] -= 1
            chosen.append(index)
    return sorted(chosen)
