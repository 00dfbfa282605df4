"""Names that training programs put before a model's own: module., model., teacher.backbone. ..."""

from collections.abc import Callable

from vitrail.weights.formats.rules import State, first

COMPILED = "_orig_mod."
"""What torch.compile puts before the names of whatever it compiled."""
WRAPPERS = (
    "ema_model", "model_ema", "ema", "teacher", "module", "model", "net", "network", "backbone",
    "student",
)  # fmt: skip
"""Attributes under which programs keep a model: averages of the weights before the raw ones."""


def unwrap(state: State, is_known: Callable[[str], bool]) -> tuple[State, list[str]]:
    """Return the tensors by the model's own names, and notes of what was changed or left out.

    Args:
        state: tensors by their names in the file.
        is_known: whether a name is one of a layout that can be read.
    """
    notes = []
    if any(COMPILED in key for key in state):
        state = {key.replace(COMPILED, ""): tensor for key, tensor in state.items()}
        notes.append(f"{COMPILED} removed from the names (torch.compile)")
    removed = ""
    beside: list[str] = []
    while not any(map(is_known, state)):
        heads = {key.partition(".")[0] for key in state}
        wrapper = next((name for name in WRAPPERS if name in heads), None)
        if wrapper is None:
            break
        prefix = f"{wrapper}."
        beside += [removed + key for key in state if not key.startswith(prefix)]
        state = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        removed += prefix
    if removed:
        notes.append(f"{removed} removed from the names")
    if beside:
        notes.append(f"left out, as not under {removed}: {first(beside)}")
    return state, notes
