"""Stratified splits and subsets: how many items each class gives, and which. No torch is imported.

Items are file names or image indices, grouped by class. Which are chosen depends on a rank of each
item alone (a hash, or its place in a fixed random order), never on the order of the items.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from vitrail.errors import ConfigError

HELD_OUT = 10
"""One of this many images is held out for validation, and of a single tree of classes for test."""

Item = TypeVar("Item", str, int)
ByClass = list[list[Item]]


def shares(counts: Sequence[int], wanted: int) -> list[int]:
    """Return how many of each class make ``wanted`` in all: its exact share, to within one."""
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


def cut(
    by_class: ByClass[Item], counts: Sequence[int], rank: Callable[[Item], object]
) -> tuple[ByClass[Item], ByClass[Item]]:
    """Return of each class the remaining items and the ``counts`` ones of lowest rank, sorted."""
    rest, chosen = [], []
    for items, count in zip(by_class, counts, strict=True):
        ranked = sorted(items, key=rank)  # type: ignore[arg-type]
        rest.append(sorted(ranked[count:]))
        chosen.append(sorted(ranked[:count]))
    return rest, chosen
