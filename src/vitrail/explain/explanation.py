"""One picture and one model -> frames of maps -> a picture, an animation or a page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from vitrail.config.drawing import Look
from vitrail.config.settings import require
from vitrail.data.pictures import Fit
from vitrail.errors import ConfigError, nearest, printable
from vitrail.evaluation.calibration import UNCALIBRATED, Calibration, describe_unlike
from vitrail.explain.checks import pick
from vitrail.explain.map_settings import METHODS, TITLES, VIEWS, MapSettings, Method
from vitrail.explain.methods import (
    Maps,
    attention_by_head,
    attention_by_query,
    compute_maps,
    contributions_by_layer,
)
from vitrail.explain.stored_scores import Verdict
from vitrail.explain.token_views import ColorBasis, fit_colors
from vitrail.model.vit import VisionTransformer

Kind = Literal["rollout", "layers", "heads", "queries", "training", "methods", "single"]
"""What varies between frames; ``methods`` and ``single`` follow from the method."""
ACCUMULATING: tuple[Method, ...] = ("rollout", "gradient_rollout", "relevance")

CORRECT, WRONG = "✓", "✗"

Checkpoints = Sequence[tuple[str, VisionTransformer]]
"""The models of a run, each with its title, for example ("epoch 3", model)."""


@dataclass(frozen=True)
class Subject:
    """One picture and the model that it is shown to.

    Shapes:
        image_1CHW, normalized; raw_HWC, uint8, the picture as the model sees it; picture_HWC,
        uint8, the picture at its original size.
    """

    model: VisionTransformer
    image_1CHW: Tensor
    raw_HWC: np.ndarray
    picture_HWC: np.ndarray
    fit: Fit
    classes: tuple[str, ...]
    name: str = "picture"
    label: str = ""
    """The true class, if known."""
    basis: ColorBasis | None = None
    """The colors of features, if other pictures share them. Default: fitted to this picture."""
    calibration: Calibration = UNCALIBRATED
    verdict: Verdict | None = None
    """What the stored scores say about the methods on this model."""

    def __repr__(self) -> str:
        height, width = self.picture_HWC.shape[:2]
        return f"Subject({self.name!r}, {width} x {height} pixels)"

    @property
    def unlike(self) -> str:
        """A note if the picture is unlike the training images, else ""."""
        if not self.calibration.mean:
            return ""
        with torch.inference_mode():
            features_1D = self.model.features(self.image_1CHW).float().cpu().numpy()
        return describe_unlike(self.calibration.familiarity(features_1D))

    def failures(self, settings: MapSettings) -> tuple[str, ...]:
        """Return the tests that a method fails on this model, by the stored scores.

        The tests apply to the map of a class at the last layer, with all heads; for other maps,
        none are returned.
        """
        narrowed = settings.query, settings.heads, settings.against
        early = settings.layers is not None and self.model.config.n_layers not in settings.layers
        if self.verdict is None or early or any(each is not None for each in narrowed):
            return ()
        badges = self.verdict.badges
        return next((b.failures for b in badges if b.method == settings.variant), ())

    def find_class(self, name: str) -> int:
        """Return a class's index.

        Raises:
            ConfigError: the model has no such class; the nearest is suggested.
        """
        hint = nearest(name, self.classes) if isinstance(name, str) else ""
        require(
            name in self.classes,
            f"the model has no class {name!r:.100}{hint}: one of {', '.join(self.classes[:20])}",
        )
        return self.classes.index(name)


@dataclass(frozen=True)
class Frame:
    """One map, its title, and the model's prediction for the picture."""

    map_GJ: np.ndarray
    """One value per patch or pixel; for features a color (G, J, 3), from 0 to 1."""
    title: str
    prediction: str
    """The predicted class and its probability; then ✓, or ✗ and the label, if it is known."""
    query: tuple[int, int] | None = None
    correct: bool | None = None
    """Whether the predicted class is the label; None if the label is not known."""
    signed: bool = False
    """Whether negative values of the map count against the class."""
    errors_GJ: np.ndarray | None = None
    """Standard errors of Shapley values; NaN for a single pair of orders."""
    failures: tuple[str, ...] = ()
    """The tests that the method fails on this model, by the stored scores, in words."""

    def __repr__(self) -> str:
        return f"Frame({self.title!r}, {self.prediction!r})"


@dataclass(frozen=True)
class Explanation:
    """What a model looked at in one picture, frame by frame; ``.save("x.gif")`` draws it."""

    subject: Subject
    settings: MapSettings
    kind: Kind
    frames: tuple[Frame, ...]
    class_index: int
    """The explained class: the given or the predicted one."""
    columns: int | None = None
    """Columns of the sheet, if the frames are a grid (heads, queries)."""
    row_titles: tuple[str, ...] = ()

    def _marked(self) -> "Explanation":
        """Return a copy whose frames name the tests that the method fails."""
        failures = self.subject.failures(self.settings)
        return replace(self, frames=tuple(replace(f, failures=failures) for f in self.frames))

    @property
    def maps_FGJ(self) -> np.ndarray:
        """The maps, one per frame, with one value (for features, a color) per patch or pixel.

        They are not normalized.

        Raises:
            ConfigError: the maps have different shapes.
        """
        shapes = {frame.map_GJ.shape for frame in self.frames}
        colors = any(len(shape) == 3 for shape in shapes)
        words = "features has a color per patch: request it separately"
        other = "some maps have a value per pixel: use resolution patch"
        require(len(shapes) == 1, words if colors else other)
        return np.stack([frame.map_GJ for frame in self.frames])

    @property
    def errors_FGJ(self) -> np.ndarray | None:
        """The standard errors of Shapley values, NaN for other methods; None if there are none."""
        if all(frame.errors_GJ is None for frame in self.frames):
            return None
        errors = [frame.errors_GJ for frame in self.frames]
        none_GJ = np.full_like(self.maps_FGJ[0], np.nan)
        return np.stack([none_GJ if errors_GJ is None else errors_GJ for errors_GJ in errors])

    @property
    def about(self) -> str:
        """The method, or the number of methods."""
        return f"{len(self.frames)} methods" if self.kind == "methods" else self.settings.method

    @property
    def titles(self) -> tuple[str, ...]:
        """The title of each map."""
        return tuple(frame.title for frame in self.frames)

    def __repr__(self) -> str:
        prediction = printable(self.frames[-1].prediction)
        number = f"{len(self.frames)} map{'s' if len(self.frames) > 1 else ''}"
        return f"Explanation({self.subject.name!r}, {self.about}, {number}, {prediction})"

    def _repr_html_(self) -> str:
        from vitrail.explain.draw import to_html

        return to_html(self)

    def _repr_png_(self) -> bytes:
        from vitrail.explain.draw import to_picture

        return to_picture(self, Look())

    def save(self, path: str | Path, **look: Any) -> Path:
        """Write the format of the extension, see ``draw.save``; ``look`` are fields of ``Look``."""
        # Imported here: matplotlib takes a second to load, and computing maps does not need it.
        from vitrail.explain.draw import save

        return save(self, Path(path), Look(**look))


def choose(method: Method | None, kind: str | None) -> tuple[Method, Kind]:
    """Return method and kind; a missing one follows from the other.

    Raises:
        ConfigError: the two cannot be combined.
    """
    if kind is None:
        by_method: dict[Method, Kind] = dict.fromkeys(ACCUMULATING, "rollout")
        by_method |= dict.fromkeys(("attention", *VIEWS), "layers")
        method = method or "rollout"
        return method, by_method.get(method, "single")
    able: dict[str, tuple[Method, ...]] = {
        "rollout": ACCUMULATING,
        "layers": ("attention", "balanced", *VIEWS),
        "heads": ("attention",),
        "queries": ("attention", "rollout"),
        "training": ("rollout", *(m for m in METHODS if m != "rollout"), "similarity", "norms"),
    }
    require(kind in able, f"frames {kind!r}{nearest(kind, able)}: one of {', '.join(able)}")
    if method is not None and method not in able[kind]:
        raise ConfigError(
            f"frames {kind} cannot show method {method}: leave out one of them, or use method "
            f"{' or '.join(able[kind])}"
        )
    return method or able[kind][0], cast(Kind, kind)


def explain(
    subject: Subject,
    settings: MapSettings,
    *,
    kind: str | None = None,
    class_name: str | None = None,
    checkpoints: Checkpoints = (),
) -> Explanation:
    """Compute the maps of one picture.

    Args:
        subject: the picture and the model.
        settings: which map.
        kind: what varies between frames. Default: what fits the method.
        class_name: the class to explain. Default: the predicted one.
        checkpoints: the models for kind ``training``.

    Raises:
        ConfigError: a class, layer, head or query that does not exist, or settings that conflict.
    """
    _, chosen = choose(settings.method, kind)
    index = None if class_name is None else subject.find_class(class_name)
    if chosen == "heads":
        return _by_head(subject, settings, index)
    if chosen == "queries":
        return _by_query(subject, settings, index)
    if chosen == "training":
        return _by_checkpoint(subject, settings, index, checkpoints)
    if chosen == "layers" and settings.method == "balanced":
        return _by_depth(subject, settings, index)
    maps = maps_of(subject, subject.model, settings, index)
    titles = {
        "rollout": "through layer {}",
        "layers": "layer {}",
        "single": TITLES[settings.method],
    }
    frames = tuple(
        _frame(subject, maps, map_GJ, titles[chosen].format(layer), maps.query)
        for map_GJ, layer in zip(maps.values_BLGJ[0], maps.layers, strict=True)
    )
    return Explanation(subject, settings, chosen, frames, int(maps.classes_B[0]))._marked()


def compare(
    subject: Subject, settings: Sequence[MapSettings], *, class_name: str | None = None
) -> Explanation:
    """Compute the last map of several methods, one frame each."""
    index = None if class_name is None else subject.find_class(class_name)
    all_maps = [maps_of(subject, subject.model, each, index) for each in settings]
    frames = tuple(
        replace(
            _frame(subject, maps, maps.values_BLGJ[0, -1], _title(each), maps.query),
            failures=subject.failures(each),
        )
        for each, maps in zip(settings, all_maps, strict=True)
    )
    # The caption is that of the first method that has a class to explain against, if one is given.
    first = next((each for each in settings if each.against is not None), settings[0])
    return Explanation(subject, first, "methods", frames, int(all_maps[0].classes_B[0]))


def _title(settings: MapSettings) -> str:
    """Return the method's title, with the settings that make a variant of it, layers and heads."""
    parts = [TITLES[settings.method], *settings.variant.split(":")[1:]]
    for name, numbers in (("layer", settings.layers), ("head", settings.heads)):
        if numbers:
            parts.append(f"{name}{'s' * (len(numbers) > 1)} {' '.join(map(str, numbers))}")
    return ", ".join(parts)


def maps_of(
    subject: Subject, model: VisionTransformer, settings: MapSettings, index: int | None
) -> Maps:
    """Compute the maps of the subject's picture with a model.

    Raises:
        ConfigError: as ``compute_maps``, or a class is explained against itself.
    """
    classes_B = None if index is None else torch.tensor([index])
    basis = subject.basis if settings.method == "features" else None
    maps = compute_maps(model, subject.image_1CHW, settings, classes_B=classes_B, basis=basis)
    if int(maps.classes_B[0]) == settings.against:
        raise ConfigError(
            f"the explained class and the one it is explained against are both "
            f"{subject.classes[settings.against]!r}: give two different classes"
        )
    return maps


def share_colors(subjects: Sequence[Subject]) -> list[Subject]:
    """Return pictures of one model whose features have the same colors, fitted to all of them."""
    images_BCHW = torch.cat([subject.image_1CHW for subject in subjects])
    basis = fit_colors(subjects[0].model, images_BCHW)
    return [replace(subject, basis=basis) for subject in subjects]


def _by_head(subject: Subject, settings: MapSettings, index: int | None) -> Explanation:
    """One frame per head, layer by layer."""
    require(settings.fusion == "mean", "frames heads shows each head separately: leave out fusion")
    config = subject.model.config
    layers = pick("layer", settings.layers, config.n_layers)
    heads = pick("head", settings.heads, config.n_attention_heads)
    maps = maps_of(subject, subject.model, replace(settings, heads=None), index)
    maps_LAGJ = attention_by_head(subject.model, subject.image_1CHW, query=settings.query)[0]
    frames = tuple(
        _frame(subject, maps, maps_LAGJ[layer - 1, head - 1], f"layer {layer}, head {head}",
               settings.query)
        for layer in layers
        for head in heads
    )  # fmt: skip
    rows = tuple(f"layer {layer}" for layer in layers)
    return Explanation(subject, settings, "heads", frames, int(maps.classes_B[0]), len(heads), rows)


def _by_depth(subject: Subject, settings: MapSettings, index: int | None) -> Explanation:
    """One frame per depth, from the head back to the stem: where the evidence is."""
    require(settings.points is None, "frames layers uses one gradient: leave out points")
    whole = settings.resolution == "pixel"
    require(whole, "frames layers has one value per patch anyway: leave out resolution")
    maps = maps_of(subject, subject.model, settings, index)
    maps_LGJ = contributions_by_layer(
        subject.model, subject.image_1CHW, maps.classes_B, against=settings.against
    )[0]
    titles = ["before layer 1", *(f"after layer {layer}" for layer in range(1, len(maps_LGJ)))]
    frames = tuple(
        _frame(subject, maps, map_GJ, title, None)
        for title, map_GJ in reversed(list(zip(titles, maps_LGJ, strict=True)))
    )
    return Explanation(subject, settings, "layers", frames, int(maps.classes_B[0]))._marked()


def _by_query(subject: Subject, settings: MapSettings, index: int | None) -> Explanation:
    """One frame per patch as the query: of one layer's attention, or of the full rollout."""
    require(settings.query is None, "frames queries goes through all patches: leave out query")
    require(settings.heads is None, "frames queries fuses all heads: leave out heads")
    require(settings.fusion != "norm", "frames queries fuses heads by mean, max or min")
    require(settings.discard_ratio == 0, "frames queries discards nothing: leave out discard_ratio")
    layer = None
    _require_one_layer(settings)
    if settings.method == "attention":
        layer = pick("layer", settings.layers, subject.model.config.n_layers)[-1]
    else:
        require(settings.layers is None, "a rollout runs through all layers: leave out layers")
    maps_NGJ = attention_by_query(
        subject.model,
        subject.image_1CHW,
        layer=layer,
        fusion=settings.fusion,  # type: ignore[arg-type]
    )[0]
    maps = maps_of(subject, subject.model, settings, index)
    source, columns = "rollout" if layer is None else f"layer {layer}", maps_NGJ.shape[2]
    frames = tuple(
        _frame(subject, maps, map_GJ, f"{source}, from patch {row}, {column}", (row, column))
        for number, map_GJ in enumerate(maps_NGJ)
        for row, column in [divmod(number, columns)]
    )
    return Explanation(subject, settings, "queries", frames, int(maps.classes_B[0]), columns)


def _by_checkpoint(
    subject: Subject, settings: MapSettings, index: int | None, checkpoints: Checkpoints
) -> Explanation:
    """One frame per checkpoint of the run, each with its prediction."""
    require(
        len(checkpoints) > 1,
        f"frames training needs a run folder with several checkpoints, not {len(checkpoints)}: "
        "train with --keep_checkpoints 0 to keep all",
    )
    _require_one_layer(settings)
    all_maps = [maps_of(subject, model, settings, index) for _, model in checkpoints]
    frames = tuple(
        _frame(subject, maps, maps.values_BLGJ[0, -1], title, maps.query)
        for (title, _), maps in zip(checkpoints, all_maps, strict=True)
    )
    return Explanation(subject, settings, "training", frames, int(all_maps[-1].classes_B[0]))


def _require_one_layer(settings: MapSettings) -> None:
    """Refuse several layers where one is shown: the given one or, by default, the last."""
    require(
        settings.layers is None or len(set(settings.layers)) <= 1,
        f"layers is {settings.layers}, but these frames show one: give a single layer",
    )


def _frame(
    subject: Subject, maps: Maps, map_GJ: Tensor, title: str, query: tuple[int, int] | None
) -> Frame:
    """Return a frame with the prediction of the model that ``maps`` were computed with.

    The prediction also names the explained class if that is not the predicted one.
    """
    if not subject.classes:
        return Frame(map_GJ.numpy(), title, "", query)
    errors_GJ = None if maps.errors_BLGJ is None else maps.errors_BLGJ[0, -1].numpy()
    probabilities_Y = subject.calibration.probabilities(maps.logits_BY[0].numpy())
    top, explained = int(probabilities_Y.argmax()), int(maps.classes_B[0])
    prediction = f"{subject.classes[top]} {probabilities_Y[top]:.1%}"
    correct = subject.classes[top] == subject.label if subject.label else None
    if correct is not None:
        prediction += f" {CORRECT}" if correct else f" {WRONG} {subject.label}"
    if explained != top:
        name = subject.classes[explained]
        prediction += f"   (explained: {name} {probabilities_Y[explained]:.1%})"
    return Frame(map_GJ.numpy(), title, prediction, query, correct, maps.signed, errors_GJ)
