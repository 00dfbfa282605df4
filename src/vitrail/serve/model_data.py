"""A model's own data: example pictures, the confusion matrix, the mistakes; and its run."""

import io
import logging
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.config.settings import DataConfig
from vitrail.data.images import ImageSet, normalize
from vitrail.data.pictures import framing
from vitrail.data.shapes import draw_shapes
from vitrail.errors import VitrailError, printable
from vitrail.inference.classifier import Classifier
from vitrail.serve.models import MissingError, Shelf
from vitrail.serve.responses import to_png
from vitrail.training.run_folder import load_split, read_rows

log = logging.getLogger("vitrail")

MOST_OPEN = 3
"""Number of models whose validation images stay in memory; those being evaluated always do."""
EXAMPLES, LISTED = 10, 60
"""Number of example pictures, and of pictures listed for a cell of the confusion matrix."""
BATCH = 64
EXAMPLE_SEED = 3
"""Seed of shapes that are used for neither training nor testing."""


@dataclass
class Data:
    """A model's validation images, and its probabilities for those evaluated so far."""

    classifier: Classifier
    images: ImageSet
    parts: list[Tensor] = field(default_factory=list)
    evaluated: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def idle(self) -> bool:
        """Whether no evaluation has begun, or it has ended."""
        return self.evaluated in (0, len(self.images))


class Gallery:
    """The data of the served models; every method may be called from several threads."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf, self._lock = shelf, threading.Lock()
        self._open: OrderedDict[str, Data] = OrderedDict()
        self._opening: dict[str, threading.Lock] = {}
        self._shown: dict[str, ImageSet | None] = {}

    def examples(self, name: str) -> list[str]:
        """Return the class of each example picture."""
        examples = self._examples(name)
        return [printable(examples.classes[label]) for label in examples.labels_B.tolist()]

    def example(self, name: str, index: int) -> bytes:
        """Return an example picture as a PNG; see ``picture``."""
        return _png_of(name, self._examples(name), index)

    def picture(self, name: str, index: int) -> bytes:
        """Return a validation image as a PNG.

        Raises:
            MissingError: there is no image of this number.
        """
        return _png_of(name, self._data(name).images, index)

    def evaluate(self, name: str) -> bool:
        """Evaluate the next images; return whether all are done."""
        data = self._data(name)
        _require_images(data, name)
        with data.lock:
            raw_BCHW = data.images.raw_BCHW[data.evaluated : data.evaluated + BATCH]
            if len(raw_BCHW):
                classifier = data.classifier
                raw_BCHW = raw_BCHW.to(classifier.device)
                images_BCHW = normalize(raw_BCHW, classifier.mean, classifier.std)
                data.parts.append(classifier.probabilities(images_BCHW))
                data.evaluated += len(raw_BCHW)
            return data.evaluated == len(data.images)

    def confusion(self, name: str) -> dict[str, Any]:
        """Return the counts so far, rows are labels, and how many images were evaluated."""
        data = self._data(name)
        _require_images(data, name)
        Y = len(data.images.classes)
        probabilities_BY, labels_B = _evaluated(data)
        pairs_B = labels_B * Y + probabilities_BY.argmax(1)
        return {
            "classes": [printable(each) for each in data.images.classes],
            "counts": pairs_B.bincount(minlength=Y * Y).view(Y, Y).tolist(),
            "evaluated": len(labels_B),
            "images": len(data.images),
        }

    def cell(self, name: str, label: int, predicted: int) -> list[dict[str, Any]]:
        """Return the images of one label that got one prediction: mistakes, most confident first.

        Correct predictions are listed with the least confident first.
        """
        data = self._data(name)
        probabilities_BY, labels_B = _evaluated(data)
        best_B = probabilities_BY.argmax(1)
        index_B = ((labels_B == label) & (best_B == predicted)).nonzero().flatten()
        sure_B = probabilities_BY[index_B].amax(1) if len(index_B) else torch.zeros(0)
        order_B = sure_B.argsort(descending=label != predicted)[:LISTED]
        return [
            {"index": int(index_B[i]), "probability": float(sure_B[i])} for i in order_B.tolist()
        ]

    def run(self, name: str) -> dict[str, Any]:
        """Return the epochs of a run so far.

        Raises:
            MissingError: the model is not a run.
        """
        folder = self._shelf.run_folder(name)
        if folder is None:
            raise MissingError(f"{name} is not a run: it has no training to show")
        try:
            rows = read_rows(folder)
        except VitrailError as error:
            log.warning("%s", error)
            raise MissingError(f"the metrics of {name} cannot be read") from error
        return {
            "epochs": self._shelf.get(name).config.training.epochs,
            "finished": (folder / "result.json").exists(),
            "rows": [{key: _finite(value) for key, value in row.items()} for row in rows],
        }

    def _examples(self, name: str) -> ImageSet:
        """Return one image of each of the first classes, if possible without loading data."""
        classifier, examples = self._shelf.get(name), self._shown.get(name)
        if examples is None or examples.classes != classifier.classes:  # or it was replaced
            examples = self._shown[name] = _quick_examples(classifier)
        if examples is None:
            images = self._data(name).images
            labels = images.labels_B.tolist()
            first = [labels.index(label) for label in sorted(set(labels))[:EXAMPLES]]
            examples = self._shown[name] = images.take(torch.tensor(first, dtype=torch.int64))
        return examples

    def _data(self, name: str) -> Data:
        """Return a model's validation images; results of older weights are dropped."""
        classifier = self._shelf.get(name)
        with self._lock:
            opening = self._opening.setdefault(name, threading.Lock())
        with opening:  # a download must not delay other models
            data = self._open.get(name)
            if data is None or _source(data.classifier) != _source(classifier):
                data = _load(name, classifier)
            elif data.classifier is not classifier:
                data = Data(classifier, data.images)
            with self._lock:
                self._open[name] = data
                self._open.move_to_end(name)
                idle = [key for key, each in self._open.items() if each.idle and key != name]
                for key in idle[: max(0, len(self._open) - MOST_OPEN)]:
                    del self._open[key]
        return data


def _source(classifier: Classifier) -> tuple[DataConfig, tuple[int, int], tuple[str, ...]]:
    """Return what a model's images depend on."""
    return classifier.config.data, classifier.config.model.image_hw, classifier.classes


def _require_images(data: Data, name: str) -> None:
    if not len(data.images):
        raise MissingError(f"the data that {name} was trained on is not on this machine")


def _evaluated(data: Data) -> tuple[Tensor, Tensor]:
    """Return the probabilities (B, Y) and labels (B,) of the images evaluated so far."""
    with data.lock:
        empty_BY = torch.zeros(0, len(data.images.classes))
        probabilities_BY = torch.cat([empty_BY, *data.parts])
    return probabilities_BY, data.images.labels_B[: len(probabilities_BY)]


def _png_of(name: str, images: ImageSet, index: int) -> bytes:
    if index >= len(images):
        raise MissingError(f"{name} has no picture {index}: it has {len(images)}")
    return to_png(images.raw_BCHW[index].permute(1, 2, 0).numpy())


def _load(name: str, classifier: Classifier) -> Data:
    """Load the validation images; none if they are not on this machine."""
    config, classes = classifier.config.model, classifier.classes
    try:
        images = load_split(classifier, "validation")
        if images.classes == classes:
            return Data(classifier, images)
    except VitrailError as error:
        log.warning("no validation images of %s: %s", name, error)
    shape = (0, config.n_channels, *config.image_hw)
    nothing = ImageSet(torch.zeros(shape, dtype=torch.uint8), torch.zeros(0).long(), classes)
    return Data(classifier, nothing)


def _quick_examples(classifier: Classifier) -> ImageSet | None:
    """Return an image of each class of CIFAR-10 or shapes; None for other datasets."""
    config, classes = classifier.config, classifier.classes
    if config.data.dataset == "shapes":
        images = draw_shapes(len(classes), seed=EXAMPLE_SEED)
    elif config.data.dataset == "cifar10" and len(classes) == EXAMPLES:
        file = resources.files("vitrail.serve") / "page" / "cifar10.png"
        with Image.open(io.BytesIO(file.read_bytes())) as strip:
            raw_BHWC = np.stack(np.split(np.array(strip.convert("RGB")), EXAMPLES, axis=1))
        raw_BCHW = torch.from_numpy(raw_BHWC).permute(0, 3, 1, 2).contiguous()
        images = ImageSet(raw_BCHW, torch.arange(EXAMPLES), classes)
    else:
        return None
    images = images.resized(config.model.image_hw, framing(config.data))
    return images.with_channels(config.model.n_channels)


def _finite(value: Any) -> Any:
    """Return a number that JSON can represent, else None."""
    return value if isinstance(value, int) or (value is not None and math.isfinite(value)) else None
