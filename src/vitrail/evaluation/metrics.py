"""Logits of a whole split, and the metrics computed from them."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.data.images import ImageSet, normalize
from vitrail.errors import CheckpointError, DataError
from vitrail.evaluation.calibration import UNCALIBRATED, Calibration
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import distributed

Precision = Literal["float32", "bfloat16"]  # of matrix products
TOP5_CLASSES = 10
"""Fewest classes for which top-5 accuracy is reported."""
CALIBRATION_BINS = 15
"""Number of bins, as in Guo et al. 2017."""
NORMAL_95 = 1.959963984540054
"""Standard deviations around the mean that hold 95% of a normal distribution."""
CPU_BATCH = 64
"""Largest batch on a CPU: activations then fit in its caches."""


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose confidence (highest probability) is in [low, high)."""

    low: float
    high: float
    share: float
    """Fraction of all images."""
    confidence: float | None
    """Mean confidence; None in an empty bin."""
    accuracy: float | None
    """Accuracy on these images; None in an empty bin."""


@dataclass(frozen=True)
class Metrics:
    """Metrics of a model on one split. Fractions are in [0, 1]."""

    classes: tuple[str, ...]
    images: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    """95% confidence interval (Wilson 1927)."""
    loss: float
    """Mean cross-entropy in nats."""
    top5_accuracy: float | None
    """None with fewer than TOP5_CLASSES classes."""
    expected_calibration_error: float
    """Weighted mean gap between confidence and accuracy (Guo et al. 2017, equation 3)."""
    calibration_error_before: float
    """The same for the uncalibrated logits."""
    temperature: float
    """What the logits were divided by, for all probabilities and so for the loss."""
    smoothing: float
    """The label smoothing that was undone before the division."""
    macro_precision: float
    """Mean over the classes that have images; a class never predicted counts as 0."""
    macro_recall: float
    """Mean over the classes that have images."""
    precision_Y: tuple[float | None, ...]
    """None for a class never predicted."""
    recall_Y: tuple[float | None, ...]
    """None for a class without images."""
    support_Y: tuple[int, ...]
    """Number of images of each class."""
    confusion_YY: tuple[tuple[int, ...], ...]
    """Counts. Rows: the true class. Columns: the predicted class."""
    calibration: tuple[CalibrationBin, ...]
    tta: bool = False
    """Whether the logits are those of SixViews (test-time augmentation)."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; metrics of single classes are under ``per_class``."""
        values = dataclasses.asdict(self)
        columns = (values.pop(f"{name}_Y") for name in ("precision", "recall", "support"))
        values["per_class"] = [
            {"class": name, "precision": precision, "recall": recall, "support": support}
            for name, precision, recall, support in zip(
                values.pop("classes"), *columns, strict=True
            )
        ]
        values["accuracy_interval"] = list(self.accuracy_interval)
        values["confusion"] = [list(row) for row in values.pop("confusion_YY")]
        values["calibration"] = list(values.pop("calibration"))
        return values


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside the block; restore the mode of every module after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def predict_logits(
    model: nn.Module,
    images: ImageSet,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    batch_size: int = 500,
    precision: Precision = "float32",
) -> Tensor:
    """Run the model, already on ``device``, over all images in order.

    The ranks of a run divide whole batches among them, so the logits equal those of a single
    process bit for bit; every rank returns the logits of all images.

    Shapes:
        returns logits_BY, float32, on the CPU

    Raises:
        DataError: there are no images.
    """
    if len(images) == 0:
        raise DataError("there are no images to evaluate: give at least one")
    mine_BCHW = images.raw_BCHW[distributed.rows(len(images), chunk=batch_size)]
    if not len(mine_BCHW):  # more ranks than batches
        return distributed.join_rows(None)
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    chunks = []
    with evaluating(model), torch.inference_mode(), half:
        together = min(batch_size, CPU_BATCH) if device.type == "cpu" else batch_size
        for raw_BCHW in torch.split(mine_BCHW, together):
            chunks.append(model(normalize(raw_BCHW.to(device), mean, std)))
    # Outside of inference mode, so that the result is an ordinary tensor.
    return distributed.join_rows(torch.cat(chunks).float().cpu())


class Features(nn.Module):
    """A model that returns the input of its head, (B, D), instead of its logits."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the features of images, (B, D)."""
        return self.model.features(images_BCHW)


class SixViews(nn.Module):
    """A model with test-time augmentation: mean logits of an image, two shifts, and mirror images.

    The image has weight 1/2, and two copies shifted by one pixel along a diagonal (reflected at the
    border) have 1/4 each; half of every weight goes to the mirror image.

    Source: Jordan 2024, arXiv:2404.00498, section 3.5.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the averaged logits (B, Y)."""
        H, W = images_BCHW.shape[-2:]
        padded_BCHW = F.pad(images_BCHW, (1, 1, 1, 1), mode="reflect")
        logits_BY = torch.zeros(())
        for offset, weight in ((1, 0.5), (0, 0.25), (2, 0.25)):
            view_BCHW = padded_BCHW[..., offset : offset + H, offset : offset + W]
            both_BY = self.model(view_BCHW) + self.model(view_BCHW.flip(-1))
            logits_BY = logits_BY.to(both_BY) + weight / 2 * both_BY
        return logits_BY


def quick_scores(logits_BY: Tensor, labels_B: Tensor) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy (nats), the metrics of each epoch.

    Raises:
        DataError: there are no images.
        CheckpointError: a logit is not finite.
    """
    if len(labels_B) == 0:
        raise DataError("there are no images to evaluate: give at least one")
    broken = int((~logits_BY.isfinite()).any(1).sum())
    if broken:
        raise CheckpointError(
            f"the model's output is not finite (nan, inf) for {broken} of {len(labels_B)} images: "
            "its weights are corrupt, use an earlier checkpoint"
        )
    right = int((logits_BY.argmax(1) == labels_B).sum())
    loss = F.cross_entropy(logits_BY.double(), labels_B)
    return right / len(labels_B), loss.item()


def measure(
    logits_BY: Tensor,
    labels_B: Tensor,
    *,
    classes: Sequence[str],
    calibration: Calibration = UNCALIBRATED,
    tta: bool = False,
) -> Metrics:
    """Compute all metrics of a split; probabilities are the calibrated ones.

    Raises:
        DataError: there are no images, or the number of classes differs from that of the logits.
        CheckpointError: a logit is not finite.
    """
    n_classes = logits_BY.shape[1]
    if n_classes != len(classes):
        raise DataError(
            f"the model has {n_classes} classes, but the dataset has {len(classes)}: "
            "test it on the dataset it was trained on"
        )
    scaled_BY = calibration.scale(logits_BY.double())
    accuracy, loss = quick_scores(scaled_BY, labels_B)
    bins = _calibration(scaled_BY, labels_B)
    pairs_B = labels_B * n_classes + logits_BY.argmax(1)
    confusion_YY = torch.bincount(pairs_B, minlength=n_classes**2).view(n_classes, n_classes)
    right = confusion_YY.diagonal().tolist()
    support, predicted = confusion_YY.sum(1).tolist(), confusion_YY.sum(0).tolist()
    precision = [hits / n if n else None for hits, n in zip(right, predicted, strict=True)]
    recall = [hits / n if n else None for hits, n in zip(right, support, strict=True)]
    present = [y for y in range(n_classes) if support[y]]
    return Metrics(
        classes=tuple(classes),
        images=len(labels_B),
        accuracy=accuracy,
        accuracy_interval=wilson_interval(sum(right), len(labels_B)),
        loss=loss,
        top5_accuracy=_top5(logits_BY, labels_B) if n_classes >= TOP5_CLASSES else None,
        expected_calibration_error=_mean_gap(bins),
        calibration_error_before=_mean_gap(_calibration(logits_BY, labels_B)),
        temperature=calibration.temperature,
        smoothing=calibration.smoothing,
        macro_precision=sum(precision[y] or 0.0 for y in present) / len(present),
        macro_recall=sum(recall[y] or 0.0 for y in present) / len(present),
        precision_Y=tuple(precision),
        recall_Y=tuple(recall),
        support_Y=tuple(support),
        confusion_YY=tuple(map(tuple, confusion_YY.tolist())),
        calibration=bins,
        tta=tta,
    )


def wilson_interval(right: int, images: int, z: float = NORMAL_95) -> tuple[float, float]:
    """Return the 95% confidence interval of an accuracy.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, spread = right / images, z * z / images
    center = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / images + spread / (4 * images))
    low, high = (center - half) / (1 + spread), (center + half) / (1 + spread)
    return max(0.0, low), min(1.0, high)


def _top5(logits_BY: Tensor, labels_B: Tensor) -> float:
    guesses_B5 = logits_BY.topk(5).indices
    return int((guesses_B5 == labels_B[:, None]).sum()) / len(labels_B)


def _mean_gap(bins: Sequence[CalibrationBin]) -> float:
    """Return the mean gap between confidence and accuracy over the images."""
    return sum(
        bin.share * abs(bin.confidence - bin.accuracy)
        for bin in bins
        if bin.confidence is not None and bin.accuracy is not None
    )


def _calibration(logits_BY: Tensor, labels_B: Tensor) -> tuple[CalibrationBin, ...]:
    """Assign the images to bins of equal width by confidence; exactly 1 is in the last bin."""
    confidence_B, guess_B = logits_BY.double().softmax(1).max(1)
    right_B = (guess_B == labels_B).double()
    bin_B = (confidence_B * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    zeros = torch.zeros(CALIBRATION_BINS, dtype=torch.double)
    counts = zeros.index_add(0, bin_B, torch.ones_like(right_B)).tolist()
    confidence = zeros.index_add(0, bin_B, confidence_B).tolist()
    right = zeros.index_add(0, bin_B, right_B).tolist()
    return tuple(
        CalibrationBin(
            low=i / CALIBRATION_BINS,
            high=(i + 1) / CALIBRATION_BINS,
            share=counts[i] / len(labels_B),
            confidence=confidence[i] / counts[i] if counts[i] else None,
            accuracy=right[i] / counts[i] if counts[i] else None,
        )
        for i in range(CALIBRATION_BINS)
    )
