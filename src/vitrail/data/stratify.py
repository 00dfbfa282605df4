"""How many images each class gives to a stratified subset."""

from collections.abc import Sequence


def shares(counts: Sequence[int], wanted: int) -> list[int]:
    """Return how many of each class make ``wanted`` in all: its exact share, to within one."""
    total = sum(counts)
    parts = [count * wanted // total for count in counts]
    # What is left goes to the largest fractions, of equal ones to the first.
    order = sorted(range(len(counts)), key=lambda index: -(counts[index] * wanted % total))
    for index in order[: wanted - sum(parts)]:
        parts[index] += 1
    return parts
