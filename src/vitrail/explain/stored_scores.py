"""Badges: what ``explain --score`` found about each method, stored beside the model it is about."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.model.vit import VisionTransformer

FORMAT = 1
"""Version of the stored file; others are ignored."""
LARGEST = 1_000_000
"""A stored file with more bytes is ignored."""


class Badge(NamedTuple):
    """What the tests say about one method on one model."""

    method: str
    srg: float
    low: float
    high: float
    beats_controls: bool
    """Whether its SRG is significantly above that of every control."""
    depends_on_model: bool
    depends_on_class: bool | None
    """None where it was not tested."""

    @property
    def failures(self) -> tuple[str, ...]:
        """The tests that it fails, in words."""
        found = {
            "no better than a control": self.beats_controls,
            "does not depend on the model": self.depends_on_model,
            "does not depend on the class": self.depends_on_class is not False,
        }
        return tuple(words for words, passed in found.items() if not passed)


class Verdict(NamedTuple):
    """The tests of all methods on one model, and which map to trust."""

    split: str
    images: int
    badges: tuple[Badge, ...]
    """In descending order of SRG."""
    trust: str
    """One sentence."""


def fingerprint(model: VisionTransformer) -> str:
    """Return a hash of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_json(verdict: Verdict, model: VisionTransformer) -> dict[str, Any]:
    """Return a verdict as JSON values, with the hash of the weights that it describes."""
    badges = [badge._asdict() for badge in verdict.badges]
    about = {"format": FORMAT, "weights": fingerprint(model)}
    return about | verdict._asdict() | {"badges": badges}


def read_verdict(path: Path, model: VisionTransformer) -> Verdict | None:
    """Return the stored verdict; None if it is missing, corrupt, or about other weights.

    The file may hold more than the verdict.
    """
    try:
        if path.stat().st_size > LARGEST:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["weights"] != fingerprint(model):
            return None
        badges = tuple(Badge(**badge) for badge in found["badges"])
        return Verdict(str(found["split"]), int(found["images"]), badges, str(found["trust"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
