"""Which map to compute: the methods, and the settings that each supports.

Most methods are importance maps: what the prediction depends on. Views show the tokens themselves.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from vitrail.config.files import Checked
from vitrail.config.settings import require, require_range
from vitrail.errors import ConfigError, nearest

Method = Literal[
    "attention", "rollout", "gradient_rollout", "relevance", "gradcam", "balanced",
    "integrated_gradients", "occlusion", "shapley",
    "features", "similarity", "norms",
]  # fmt: skip
VIEWS: tuple[Method, ...] = ("features", "similarity", "norms")
"""Views of the tokens: not importance maps, so they can be neither scored nor contrasted."""
METHODS: tuple[Method, ...] = tuple(m for m in get_args(Method) if m not in VIEWS)
"""The importance maps."""
TITLES: dict[Method, str] = {
    "attention": "Attention", "rollout": "Rollout", "gradient_rollout": "Gradient rollout",
    "relevance": "Relevance", "gradcam": "Grad-CAM", "balanced": "Balanced gradient",
    "integrated_gradients": "Integrated gradients", "occlusion": "Occlusion",
    "shapley": "Shapley values", "features": "Features", "similarity": "Similarity",
    "norms": "Norms",
}  # fmt: skip
"""The methods' names as people write them."""
CLASSLESS: tuple[Method, ...] = ("attention", "rollout", *VIEWS)
"""Methods whose maps are the same for every class, so that they need none."""
ALL = "all"
"""Stands for every importance map."""
REMOVAL: tuple[Method, ...] = ("occlusion", "shapley")
"""Methods that hide patches, with a forward pass for each patch or more."""
SIGNED: tuple[Method, ...] = ("balanced", "integrated_gradients", *REMOVAL)
"""Methods whose negative values count against the class."""
Fusion = Literal["mean", "max", "min", "norm"]

SUPPORTED_SETTINGS: dict[Method, tuple[str, ...]] = {
    "attention": ("fusion", "query", "layers", "heads"),
    "rollout": ("fusion", "discard_ratio", "query", "layers", "heads"),
    "gradient_rollout": ("discard_ratio", "query", "layers", "against"),
    "relevance": ("query", "layers", "gradients", "against"),
    "gradcam": ("against",),
    "balanced": ("points", "resolution", "against"),
    "integrated_gradients": ("points", "resolution", "against"),
    "occlusion": ("window", "against"),
    "shapley": ("window", "passes", "against"),
    "features": ("layers",),
    "similarity": ("query", "layers"),
    "norms": ("layers",),
}
"""The settings that have an effect on a method."""
VARIED: dict[str, Callable[[str], Any]] = {
    "fusion": str, "discard_ratio": float, "gradients": str, "points": int, "window": int,
    "passes": int,
}  # fmt: skip
"""The settings that make a variant of a method, with the type of each."""


def default_view(given: Iterable[str], *, has_classes: bool = True) -> tuple[Method, str | None]:
    """Return the method and the kind of frames for when neither is given.

    The balanced gradient, traced back through the layers, has the best scores of the methods that
    take one pass (docs/how-to/see-through-it.md). Settings that a rollout supports select it. A
    network without classes shows its features or, for a query, its similarity.
    """
    given = set(given)
    if not has_classes and not given - {"layers", "query"}:
        return ("similarity" if "query" in given else "features"), None
    if given & set(SUPPORTED_SETTINGS["rollout"]):
        return "rollout", None
    return "balanced", None if given & {"points", "resolution"} else "layers"


WHY_UNSUPPORTED: dict[Method, str] = {
    "attention": "it shows the unchanged attention",
    "rollout": "it is the same for every class",
    "gradient_rollout": "it weights the heads by their gradients",
    "relevance": "it weights the heads by their gradients",
    "gradcam": "it uses the input of the last block, not its attention",
    "balanced": "it follows the gradient to the pixels",
    "integrated_gradients": "it follows the gradient to the pixels",
    "occlusion": "it hides patches and reads nothing inside the model",
    "shapley": "it hides patches and reads nothing inside the model",
    **dict.fromkeys(VIEWS, "it shows the tokens, not what the prediction depends on"),
}
"""Why a method supports no other setting."""


@dataclass(frozen=True)
class MapSettings(Checked):
    """Which map to compute, and how.

    Raises:
        ConfigError: an invalid value, or a setting that the method does not support.
    """

    method: Method = "attention"
    fusion: Fusion = "mean"
    """How the heads are combined; norm (of a rollout): by the size of what each token adds."""
    discard_ratio: float = 0.0
    """Fraction of each layer's attention entries, the lowest, that a rollout drops; less than 1."""
    query: tuple[int, int] | None = None
    """Patch (row, column), from 0: show what it attends to, or what is similar to it. None shows
    what the classifier reads; for similarity, the central patch."""
    layers: tuple[int, ...] | None = None
    """Layers, from 1; accumulated maps are shown after each of them. None for all."""
    heads: tuple[int, ...] | None = None
    """Heads, from 1; None for all."""
    gradients: Literal["plain", "balanced"] = "plain"
    """Gradients of relevance: the model's own, or those with frozen gates, norms and attention."""
    against: int | None = None
    """Index of a class: explain the difference to its logit, instead of the logit alone."""
    points: int | None = None
    """Points between a blank image and this one, over which gradients are averaged. None for 1
    (balanced) or 16 (integrated_gradients)."""
    resolution: Literal["pixel", "patch"] = "pixel"
    """One value per pixel, or their sum in each patch."""
    window: int = 2
    """Side of the squares of patches that occlusion hides, and shapley shows, at once."""
    passes: int = 512
    """Maximum forward passes per image for shapley, which takes at least two per square."""
    chunk: int = 64
    """Images per batch, which bounds the memory."""

    def __post_init__(self) -> None:
        choices = {
            "method": get_args(Method), "fusion": get_args(Fusion),
            "gradients": ("plain", "balanced"), "resolution": ("pixel", "patch"),
        }  # fmt: skip
        for name, known in choices.items():
            value = getattr(self, name)
            hint = nearest(value, known)
            require(value in known, f"{name} is {value!r}, not one of {', '.join(known)}{hint}")
        super().__post_init__()
        require(
            0 <= self.discard_ratio < 1,
            f"discard_ratio is {self.discard_ratio}: give a number from 0 to less than 1",
        )
        require_range(self, "chunk points window passes", 1)
        for field in fields(self):
            supported = field.name in ("method", "chunk", *SUPPORTED_SETTINGS[self.method])
            if not supported and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"{field.name} has no effect on method {self.method}: "
                    f"{WHY_UNSUPPORTED[self.method]}; leave {field.name} out"
                )
        require(
            self.fusion != "norm" or (self.method == "rollout" and self.heads is None),
            "fusion norm needs method rollout and all heads: leave out heads, or give another "
            "fusion",
        )

    @property
    def variant(self) -> str:
        """The method, with the settings that make a variant of it: ``occlusion:window=1``."""
        given = (f for f in fields(self) if f.name in VARIED and getattr(self, f.name) != f.default)
        return ":".join([self.method, *(f"{f.name}={getattr(self, f.name)}" for f in given)])


def read_variant(text: str) -> MapSettings:
    """Return the settings that ``MapSettings.variant`` names.

    Raises:
        ConfigError: an unknown method or setting, or a value that it cannot have.
    """
    method, *parts = text.split(":")
    settings: dict[str, Any] = {"method": method.strip().replace("-", "_")}
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        require(
            equals == "=" and name in VARIED,
            f"{text!r:.80} is not a variant of a method{nearest(name, VARIED)}: give "
            f"METHOD:NAME=VALUE with one of {', '.join(VARIED)}; for example, occlusion:window=1",
        )
        try:
            settings[name] = VARIED[name](value)
        except ValueError as error:
            raise ConfigError(f"{text!r:.80}: {name} is {value!r:.20}, not a number") from error
    return MapSettings(**settings)


def settings_of_all(
    methods: Iterable[Method | MapSettings] = METHODS, **settings: Any
) -> list[MapSettings]:
    """Return settings for several methods, each with those of ``settings`` it supports.

    A variant, given as settings, keeps its own. All maps have one value per patch, so that they can
    be compared, unless a resolution is given.
    """
    settings = {"resolution": "patch", **settings}
    found = []
    for method in methods:
        own = method if isinstance(method, MapSettings) else MapSettings(method=method)
        used = {
            field.name: settings[field.name]
            for field in fields(own)
            if field.name in settings
            and field.name in ("chunk", *SUPPORTED_SETTINGS[own.method])
            and getattr(own, field.name) == field.default
        }
        found.append(replace(own, **used))
    return found


def require_importance(methods: Iterable[Method | MapSettings]) -> None:
    """Refuse to score views.

    Raises:
        ConfigError: a method is a view.
    """
    for each in methods:
        method = each.method if isinstance(each, MapSettings) else each
        require(
            method not in VIEWS,
            f"{method} shows the tokens, not what the prediction depends on, so it has no score: "
            f"leave it out, or give one of {', '.join(METHODS)}",
        )


def check_names(settings: Iterable[str]) -> None:
    """Refuse unknown names of settings.

    Raises:
        ConfigError: an unknown name; the nearest known one is suggested.
    """
    known = [field.name for field in fields(MapSettings)]
    for name in settings:
        hint = nearest(name, known)
        require(name in known, f"no setting {name!r:.60}{hint}: one of {', '.join(known)}")
