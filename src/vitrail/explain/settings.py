"""Which map: the methods, and the settings that each of them supports."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from vitrail.config.settings import require, require_range
from vitrail.errors import ConfigError, nearest
from vitrail.explain.maps import HeadFusion

Method = Literal["attention", "rollout", "gradient_rollout", "relevance", "gradcam", "occlusion"]
METHODS: tuple[Method, ...] = get_args(Method)
ALL = "all"
"""Stands for every method."""

SERVED: dict[Method, tuple[str, ...]] = {
    "attention": ("fusion", "query", "layers", "heads"),
    "rollout": ("fusion", "discard_ratio", "query", "layers", "heads"),
    "gradient_rollout": ("discard_ratio", "query", "layers"),
    "relevance": ("query", "layers"),
    "gradcam": (),
    "occlusion": (),
}
"""The settings that have an effect on a method."""
WHY_NOT: dict[Method, str] = {
    "attention": "it shows the unchanged attention",
    "gradient_rollout": "it weights the heads by their gradients",
    "relevance": "it weights the heads by their gradients",
    "gradcam": "it uses the input of the last block, not its attention",
    "occlusion": "it hides patches and reads nothing inside the model",
}
"""Why a method supports no other setting."""


@dataclass(frozen=True)
class MapSettings:
    """Which map of what the model looked at.

    Raises:
        ConfigError: an impossible value, or a setting that the method does not support.
    """

    method: Method = "attention"
    fusion: HeadFusion = "mean"
    """How the heads are combined."""
    discard_ratio: float = 0.0
    """Fraction of each layer's lowest entries that a rollout drops; less than 1."""
    query: tuple[int, int] | None = None
    """Patch (row, column), from 0: show what it attends to. None shows what the head reads."""
    layers: tuple[int, ...] | None = None
    """Layers, from 1; accumulated maps are shown after each of them. None for all."""
    heads: tuple[int, ...] | None = None
    """Heads, from 1; None for all."""
    chunk: int = 64
    """Images per batch, which bounds the memory."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("fusion", self.fusion, get_args(HeadFusion))
        require(
            0 <= self.discard_ratio < 1,
            f"discard_ratio is {self.discard_ratio}: give a number from 0 to less than 1",
        )
        require_range(self, "chunk", 1)
        for field in fields(self):
            served = field.name in ("method", "chunk", *SERVED[self.method])
            if not served and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"{field.name} has no effect on method {self.method}: "
                    f"{WHY_NOT[self.method]}; leave {field.name} out"
                )


def settings_of_all(**settings: Any) -> list[MapSettings]:
    """Return the settings of every method, each with those of ``settings`` that it serves."""
    return [
        MapSettings(
            method=method,
            **{name: value for name, value in settings.items() if name in ("chunk", *served)},
        )
        for method, served in SERVED.items()
    ]


def check_names(settings: Iterable[str]) -> None:
    """Refuse a setting of maps that there is not.

    Raises:
        ConfigError: the nearest name is offered.
    """
    known = [field.name for field in fields(MapSettings)]
    for name in settings:
        hint = nearest(name, known)
        require(name in known, f"no setting {name!r:.60}{hint}: one of {', '.join(known)}")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not one of those known."""
    hint = nearest(value, known)
    require(value in known, f"{name} is {value!r}, not one of {', '.join(known)}{hint}")
