import io
import json
import sys

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from vitrail.data.images import ImageSet, normalize
from vitrail.errors import CheckpointError, DataError
from vitrail.evaluation.metrics import (
    SixViews,
    evaluating,
    measure,
    predict_logits,
    quick_scores,
    wilson_interval,
)
from vitrail.evaluation.report import metrics_table

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
CPU = torch.device("cpu")


class TinyModel(nn.Module):
    """Means of the channels through one layer; notes its mode and how many images it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 7)
        self.frozen = nn.Dropout(0.5)
        self.seen: list[tuple[int, bool]] = []

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.seen.append((len(images_BCHW), self.training or self.frozen.training))
        return self.frozen(self.layer(images_BCHW.mean((2, 3))))


class Broken(TinyModel):
    def forward(self, images_BCHW: Tensor) -> Tensor:
        raise ArithmeticError("broken")


def images(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(5)
    raw = torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=generator)
    return ImageSet(raw, torch.arange(count) % 7, tuple("abcdefg"))


def answers(n_classes: int, count: int = 211) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_classes)
    labels = torch.randint(0, n_classes, (count,), generator=generator)
    logits = torch.randn(count, n_classes, generator=generator)
    logits[torch.arange(count), labels] += 1.5
    return logits, labels


def names(n_classes: int) -> list[str]:
    return [f"class {y}" for y in range(n_classes)]


def test_logits_of_each_image_once_and_in_order() -> None:
    model, data = TinyModel(), images(11)
    logits = predict_logits(model, data, mean=MEAN, std=STD, batch_size=4, device=CPU)
    assert model.seen == [(4, False), (4, False), (3, False)]
    model.eval()
    torch.testing.assert_close(logits, model(normalize(data.raw_BCHW, MEAN, STD)).detach())
    assert logits.dtype == torch.float32
    assert not logits.is_inference()


def test_bfloat16_rounds_and_comes_back_as_float32() -> None:
    model, data = TinyModel(), images(3)
    exact = predict_logits(model, data, mean=MEAN, std=STD, device=CPU)
    rounded = predict_logits(model, data, mean=MEAN, std=STD, device=CPU, precision="bfloat16")
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, atol=0.05, rtol=0.05)


def test_every_module_gets_its_mode_back_even_after_an_error() -> None:
    model = Broken()
    model.frozen.eval()
    with pytest.raises(ArithmeticError, match="broken"):
        predict_logits(model, images(2), mean=MEAN, std=STD, device=CPU)
    assert model.training
    assert not model.frozen.training
    model.eval()
    with evaluating(model):
        pass
    assert not model.training


@pytest.mark.parametrize("n_classes", [3, 11])
def test_scores_agree_with_torchmetrics(n_classes: int) -> None:
    from torchmetrics.functional.classification import (  # takes seconds: imported by one worker
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_precision,
        multiclass_recall,
    )

    logits, labels = answers(n_classes)
    metrics = measure(logits, labels, classes=names(n_classes))
    given = {"preds": logits, "target": labels, "num_classes": n_classes}
    expected = {
        "accuracy": multiclass_accuracy(**given, average="micro"),
        "macro_precision": multiclass_precision(**given, average="macro"),
        "macro_recall": multiclass_recall(**given, average="macro"),
        "expected_calibration_error": multiclass_calibration_error(**given, n_bins=15, norm="l1"),
    }
    for name, value in expected.items():
        assert getattr(metrics, name) == pytest.approx(value.item()), name
    assert metrics.precision_Y == pytest.approx(
        multiclass_precision(**given, average=None).tolist()
    )
    assert metrics.recall_Y == pytest.approx(multiclass_recall(**given, average=None).tolist())
    assert metrics.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    if n_classes == 3:
        assert metrics.top5_accuracy is None
    else:
        top5 = multiclass_accuracy(**given, average="micro", top_k=5)
        assert metrics.top5_accuracy == pytest.approx(top5.item())


def test_a_broken_torchvision_does_not_affect_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    # A torchvision of another torch raises when it is imported, and torchmetrics imports it.
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("torchmetrics", "torchvision")
    ]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("torchmetrics", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    logits, labels = answers(11)
    assert measure(logits, labels, classes=names(11)).top5_accuracy is not None


def test_rows_of_the_confusion_matrix_are_the_true_classes() -> None:
    guesses, labels = torch.tensor([0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 2])
    metrics = measure(torch.eye(3)[guesses], labels, classes=names(3))
    assert metrics.confusion_YY == ((1, 2, 0), (0, 1, 0), (0, 0, 1))
    assert metrics.support_Y == (3, 1, 1)
    assert metrics.recall_Y == pytest.approx((1 / 3, 1, 1))
    assert metrics.precision_Y == pytest.approx((1, 1 / 3, 1))


def test_absent_and_never_predicted_classes_have_no_score() -> None:
    guesses, labels = torch.tensor([0, 0, 3, 3]), torch.tensor([0, 1, 0, 0])
    metrics = measure(torch.eye(5)[guesses], labels, classes=names(5))
    assert metrics.recall_Y == (pytest.approx(1 / 3), 0.0, None, None, None)
    assert metrics.precision_Y == (0.5, None, None, 0.0, None)
    assert metrics.macro_recall == pytest.approx((1 / 3 + 0) / 2)
    assert metrics.macro_precision == pytest.approx((0.5 + 0) / 2)


def test_a_confidence_of_one_is_in_the_last_bin() -> None:
    metrics = measure(torch.tensor([[0.0, 500.0]]), torch.tensor([1]), classes=names(2))
    assert metrics.accuracy == 1
    assert metrics.expected_calibration_error == 0
    assert [bin.share for bin in metrics.calibration] == [0.0] * 14 + [1.0]
    assert metrics.calibration[14].confidence == 1
    assert metrics.calibration[0].confidence is None


def test_bins_hold_all_images_within_their_bounds() -> None:
    bins = measure(*answers(11), classes=names(11)).calibration
    assert sum(bin.share for bin in bins) == pytest.approx(1)
    assert all(b.low <= b.confidence <= b.high for b in bins if b.confidence is not None)


def test_six_views_are_weighted_by_half_and_quarters() -> None:
    class Pixels(nn.Module):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            assert not self.training
            return images_BCHW.flatten(1)

    image_HW = torch.arange(20.0).view(4, 5)
    shifted = {
        0: image_HW,
        1: torch.stack([image_HW[r] for r in (1, 2, 3, 2)])[:, [1, 2, 3, 4, 3]],
        -1: torch.stack([image_HW[r] for r in (1, 0, 1, 2)])[:, [1, 0, 1, 2, 3]],
    }
    expected = sum(
        weight * (shifted[by] + shifted[by].flip(1)) / 2
        for by, weight in ((0, 0.5), (1, 0.25), (-1, 0.25))
    )
    logits_BY = SixViews(Pixels()).eval()(image_HW[None, None])
    torch.testing.assert_close(logits_BY.view(4, 5), expected)


def test_test_time_augmentation_is_named() -> None:
    logits_BY, labels_B = answers(3)
    for tta in (False, True):
        metrics = measure(logits_BY, labels_B, classes=names(3), tta=tta)
        assert metrics.to_json()["tta"] is tta
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(metrics_table(metrics))
        assert ("test-time augmentation" in console.export_text()) is tta


def test_wilson_interval() -> None:
    # Newcombe 1998, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1), abs=5e-5)


def test_json_is_plain_and_complete() -> None:
    metrics = measure(torch.eye(3)[[0, 2]], torch.tensor([0, 1]), classes=names(3))
    values = metrics.to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["accuracy"] == 0.5
    assert values["confusion"] == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert values["per_class"][2] == {
        "class": "class 2",
        "precision": 0.0,
        "recall": None,
        "support": 0,
    }
    assert {"classes", "recall_Y", "confusion_YY"}.isdisjoint(values)


def test_quick_scores_are_those_of_measure() -> None:
    logits, labels = answers(7)
    metrics = measure(logits, labels, classes=names(7))
    assert quick_scores(logits, labels) == (metrics.accuracy, metrics.loss)


def test_invalid_logits_and_labels_are_refused() -> None:
    nothing = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    with pytest.raises(DataError, match="no images"):
        measure(*nothing, classes=names(3))
    with pytest.raises(DataError, match="no images"):
        quick_scores(*nothing)
    with pytest.raises(DataError, match="no images"):
        predict_logits(TinyModel(), images(0), mean=MEAN, std=STD, device=CPU)
    with pytest.raises(DataError, match="model has 3 classes, but the dataset has 5"):
        measure(torch.eye(3), torch.arange(3), classes=names(5))
    with pytest.raises(CheckpointError, match="for 1 of 3 images"):
        measure(torch.tensor([[0, 1], [1, 0], [0, torch.nan]]), torch.zeros(3).long(), classes="ab")
