"""What a request asks for: its query parameters, checked, with their limits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from vitrail.config.settings import require
from vitrail.errors import ConfigError, nearest
from vitrail.explain.explanation import Subject
from vitrail.explain.map_settings import MapSettings, default_view

MOST_PASSES, MOST_POINTS = 4096, 64
"""Limits of what one request may compute."""
SLOW = ("occlusion", "shapley", "integrated_gradients")
"""Methods that take many passes."""


@dataclass(frozen=True)
class Question:
    """The parameters of one request."""

    model: str = ""
    """Name of the model; the first one if empty."""
    step: int | None = None
    """Step of a run's checkpoint; the best one if None."""
    top: int = 5
    """Number of classes in the answer."""
    hide: tuple[int, ...] = ()
    """Patches, numbered row by row from 0, that are painted in the picture's mean color."""
    prepared: bool = False
    """Whether the picture is already what the model sees: it is not cropped again."""
    seen: bool = False
    """Whether the response contains the picture as the model sees it."""
    class_name: str | None = None
    """The class to explain; the predicted one if None."""
    against: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of MapSettings, except ``against``."""

    @property
    def slow(self) -> bool:
        """Whether the map takes many passes."""
        return self.settings.get("method") in SLOW or self.settings.get("points", 1) > 1

    def map_settings(self, subject: Subject) -> MapSettings:
        """Return which map is asked for.

        Raises:
            ConfigError: a value that is invalid, too large, or has no effect on the method.
        """
        given = {"method": default_view(self.settings)[0], **self.settings}
        if self.against is not None:
            given["against"] = subject.find_class(self.against)
        side = max(subject.model.config.grid_GJ)
        for name, most in (("passes", MOST_PASSES), ("points", MOST_POINTS), ("window", side)):
            value = given.get(name, 1)
            require(value <= most, f"{name} is {value}: give at most {most}")
        return MapSettings(**given)


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError("a whole number")
    return int(text)


def _wholes(text: str) -> tuple[int, ...]:
    return tuple(map(_whole, text.split(","))) if text else ()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


def _yes(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


_PARSERS: dict[str, Callable[[str], Any]] = {
    "model": str, "step": _whole, "top": _whole, "hide": _wholes, "prepared": _yes, "seen": _yes,
    "class": str, "against": str, "method": str, "fusion": str, "discard_ratio": _number,
    "query": _wholes, "layers": _wholes, "heads": _wholes, "gradients": str, "points": _whole,
    "resolution": str, "window": _whole, "passes": _whole,
}  # fmt: skip


def read_question(parameters: Sequence[tuple[str, str]]) -> Question:
    """Return the question that query parameters ask.

    Raises:
        ConfigError: an unknown or repeated parameter, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for name, text in parameters:
        if name not in _PARSERS:
            hint, known = nearest(name, _PARSERS), ", ".join(_PARSERS)
            raise ConfigError(f"no parameter {name!r:.60}{hint}: one of {known}")
        key = "class_name" if name == "class" else name
        require(key not in values, f"{name} is given twice")
        try:
            values[key] = _PARSERS[name](text)
        except ValueError as error:
            raise ConfigError(f"{name} is {text!r:.60}: give {error}") from None
    require(values.get("top", 1) >= 1, "top is 0: give at least 1")
    query = values.get("query", (0, 0))
    require(len(query) == 2, f"query has {len(query)} numbers: give ROW,COLUMN")
    own = {f.name: values.pop(f.name) for f in fields(Question) if f.name in values}
    return Question(**own, settings=values)
