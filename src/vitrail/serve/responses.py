"""A model and a picture -> what the server answers, as plain JSON values."""

import base64
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.config.settings import require
from vitrail.data.formats import DECODE_ERRORS, JPEG
from vitrail.data.pictures import enough_side, fit_channels, framing, read_picture, seen_box
from vitrail.errors import PictureError, printable
from vitrail.evaluation.calibration import describe_unlike
from vitrail.explain.deletion_insertion import count_patches, rank_patches
from vitrail.explain.explanation import Subject, explain, maps_of
from vitrail.explain.map_metrics import center_maps
from vitrail.explain.map_settings import SUPPORTED_SETTINGS, MapSettings, require_importance
from vitrail.explain.page import make_page, page_data
from vitrail.inference.classifier import Classifier
from vitrail.runtime import rng
from vitrail.serve.parameters import Question
from vitrail.weights.pretrained import of_model_size

MOST_PIXELS, MOST_JPEG_PIXELS = 25_000_000, 64_000_000
"""Larger pictures are refused before they are decoded. JPEGs are decoded at reduced size."""
RANDOM_ORDERS, STEPS = 4, 16
"""Random orders that a curve is compared with, and points of a curve after the first."""


@dataclass(frozen=True)
class Seen:
    """A picture, and how a model sees it: raw_HWC, uint8, with the model's size and channels."""

    classifier: Classifier
    raw_HWC: np.ndarray
    picture_HWC: np.ndarray

    @cached_property
    def subject(self) -> Subject:
        """The picture as maps need it; predictions do not use it."""
        return self.classifier.subject_of(self.raw_HWC, self.picture_HWC)


def look(classifier: Classifier, body: bytes, question: Question) -> Seen:
    """Decode a picture and fit it to a model, with the question's patches painted over.

    Raises:
        PictureError: it is not a picture, or too large.
        ConfigError: a hidden patch is not in the picture.
    """
    if question.prepared:
        classifier = of_model_size(classifier)
    config, data = classifier.config.model, classifier.config.data
    _check_size(body)
    side, fit = enough_side(config.image_hw, framing(data)), framing(data)
    rgb_HWC = read_picture(body, pixel_range=data.pixel_range, shorter_side=side)
    raw_HWC = fit_channels(rgb_HWC, config.image_hw, fit, config.n_channels)
    if question.hide:
        raw_HWC = _hide(raw_HWC, question.hide, config.grid_GJ, config.patch_size)
    return Seen(classifier, raw_HWC, rgb_HWC)


def _check_size(body: bytes) -> None:
    """Refuse a picture with too many pixels, according to its header."""
    try:
        with Image.open(io.BytesIO(body)) as image:
            (width, height), jpeg = image.size, image.format in JPEG
    except Image.DecompressionBombError as error:
        raise PictureError("the picture has too many pixels: make it smaller") from error
    except DECODE_ERRORS:
        return  # read_picture reports what is wrong
    most = MOST_JPEG_PIXELS if jpeg else MOST_PIXELS
    if width * height > most:
        raise PictureError(
            f"the picture has {width} x {height} pixels, more than {most:,}: make it smaller"
        )


def _hide(
    raw_HWC: np.ndarray, patches: Sequence[int], grid_GJ: tuple[int, int], side: int
) -> np.ndarray:
    """Return the picture with patches, numbered row by row, painted in its mean color."""
    (rows, columns), hidden_HWC = grid_GJ, raw_HWC.copy()
    mean_C = raw_HWC.mean(axis=(0, 1)).round().astype(np.uint8)
    for patch in patches:
        last = rows * columns - 1
        require(patch <= last, f"hide: there is no patch {patch}: give numbers from 0 to {last}")
        top, left = (side * place for place in divmod(patch, columns))
        hidden_HWC[top : top + side, left : left + side] = mean_C
    return hidden_HWC


def predictions(
    seen: Seen, logits_Y: np.ndarray, familiarity: float | None, question: Question
) -> dict[str, Any]:
    """Return the most probable classes, and what the model sees if that was asked for."""
    probabilities_Y = seen.classifier.calibration.probabilities(logits_Y[None])[0]
    best = np.argsort(-probabilities_Y, kind="stable")[: question.top].tolist()
    names = seen.classifier.classes
    answer: dict[str, Any] = {
        "predictions": [
            {"class": printable(names[y]), "index": y, "probability": float(probabilities_Y[y])}
            for y in best
        ]
    }
    if familiarity is not None:
        answer["familiarity"] = familiarity
        answer["note"] = describe_unlike(familiarity)
    if question.seen:
        height, width = seen.picture_HWC.shape[:2]
        config = seen.classifier.config
        box = seen_box((height, width), config.model.image_hw, framing(config.data))
        answer["seen"] = {
            "picture": f"data:image/png;base64,{base64.b64encode(to_png(seen.raw_HWC)).decode()}",
            # As fractions of the picture: left, top, right, bottom.
            "box": [box[0] / width, box[1] / height, box[2] / width, box[3] / height],
        }
    return answer


def to_png(raw_HWC: np.ndarray) -> bytes:
    """Return uint8 pixels (H, W, C), with C 3 or 1, as a PNG."""
    file = io.BytesIO()
    Image.fromarray(raw_HWC if raw_HWC.shape[2] == 3 else raw_HWC[:, :, 0]).save(file, "PNG")
    return file.getvalue()


def explanation(seen: Seen, question: Question) -> dict[str, Any]:
    """Return the maps of one method."""
    subject = seen.subject
    settings = question.map_settings(subject)
    index = None if question.class_name is None else subject.find_class(question.class_name)
    answer: dict[str, Any] = {}
    maps = maps_of(subject, subject.model, settings, index)
    values_LGJ, index = maps.values_BLGJ[0], int(maps.classes_B[0])
    if maps.errors_BLGJ is not None:
        finite = bool(maps.errors_BLGJ.isfinite().all())  # one pair of orders has no spread
        answer["errors"] = _numbers(maps.errors_BLGJ[0, 0]) if finite else None
    return answer | {
        "method": settings.method,
        "class": printable(subject.classes[index]),
        "against": question.against and printable(question.against),
        "signed": maps.signed,
        "layers": list(maps.layers),
        "rows": values_LGJ.shape[1],
        "columns": values_LGJ.shape[2],
        "maps": _numbers(values_LGJ),
    }


def removal_curves(seen: Seen, question: Question) -> dict[str, Any]:
    """Return how the class's probability falls while patches are hidden, the highest first.

    ``order`` has all patches; ``curves`` the probability after each of ``counts`` patches, in the
    order of the map, from the center outward, and in random orders (their mean).
    """
    subject, (G, J) = seen.subject, seen.subject.model.config.grid_GJ
    settings = question.map_settings(subject)
    require_importance([settings.method])
    if "resolution" in SUPPORTED_SETTINGS[settings.method]:
        settings = dataclasses.replace(settings, resolution="patch")
    index = None if question.class_name is None else subject.find_class(question.class_name)
    maps = maps_of(subject, subject.model, settings, index)
    index = int(maps.classes_B[0])
    random_RGJ = torch.rand(RANDOM_ORDERS, G, J, generator=rng.generator(0, "served", 1))
    maps_OGJ = torch.cat([maps.values_BLGJ[:, -1], center_maps((G, J)), random_RGJ])
    orders_ON = rank_patches(maps_OGJ).argsort(dim=1)
    counts = count_patches(G * J, STEPS).tolist()
    side = subject.model.config.patch_size
    raw_BHWC = np.stack(
        [
            _hide(seen.raw_HWC, order_N[:count], (G, J), side)
            for order_N in orders_ON.tolist()
            for count in counts
        ]
    )
    found_OS = seen.classifier.raw_probabilities(raw_BHWC)[:, index].reshape(-1, len(counts))
    map_S, center_S, random_S = found_OS[0], found_OS[1], found_OS[2:].mean(0)
    return {
        "class": printable(subject.classes[index]),
        "order": orders_ON[0].tolist(),
        "counts": counts,
        "curves": {
            name: _numbers(torch.from_numpy(curve_S))
            for name, curve_S in (("map", map_S), ("center", center_S), ("random", random_S))
        },
    }


def page(seen: Seen, question: Question) -> bytes:
    """Return the page of one picture that needs no server."""
    shown = explain(seen.subject, MapSettings("attention"), class_name=question.class_name)
    return make_page(page_data(shown))


def describe(name: str, classifier: Classifier) -> dict[str, Any]:
    """Return what a client needs to know about a model."""
    config = classifier.config.model
    return {
        "name": name,
        "classes": [printable(each) for each in classifier.classes],
        "size": list(config.image_hw),
        "rows": config.grid_GJ[0],
        "columns": config.grid_GJ[1],
        "layers": config.n_layers,
        "heads": config.n_attention_heads,
        "parameters": sum(each.numel() for each in classifier.model.parameters()),
        "data": classifier.config.data.dataset,
        "scores": _scores(classifier),
    }


def _scores(classifier: Classifier) -> dict[str, Any] | None:
    """Return what ``explain --score`` found about the methods on this model, if it was run."""
    verdict = classifier.verdict
    if verdict is None:
        return None
    return {
        "images": verdict.images,
        "split": verdict.split,
        "trust": printable(verdict.trust),
        "methods": {
            printable(badge.method): {"srg": badge.srg, "failures": list(badge.failures)}
            for badge in verdict.badges
        },
    }


def _numbers(values: Tensor) -> Any:
    """Return nested lists of numbers with five significant digits."""
    shorten = np.vectorize(lambda value: float(f"{value:.5g}"), otypes=[float])
    return shorten(values.double().numpy()).tolist()
