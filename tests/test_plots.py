import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.errors import DataError, OutputError
from vitrail.evaluation import report as plots
from vitrail.evaluation.metrics import Metrics, measure
from vitrail.evaluation.report import plot_calibration, plot_confusion, plot_curve


def scored(classes: list[str], count: int = 97) -> Metrics:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, len(classes), (count,), generator=generator)
    logits = torch.randn(count, len(classes), generator=generator)
    return measure(logits, labels, classes=classes)


def epochs(count: int) -> list[dict[str, float | int | None]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 2 / epoch,
            "train_accuracy": 1 - 0.9 / epoch,
            "validation_loss": 1 + (epoch - 3) ** 2 / 100 if epoch % 2 else None,
            "validation_accuracy": 0.8 - (epoch - 5) ** 2 / 100 if epoch % 2 else None,
            "test_loss": 1.5,
            "test_accuracy": 0.25 + epoch / 100,
        }
        for epoch in range(1, count + 1)
    ]


def plot_curves(rows: list[Any], folder: Path) -> None:
    for quantity in ("loss", "accuracy"):
        plot_curve(rows, quantity, "quick, shapes", folder / f"graph_{quantity}.png")


def legend(figure: plots.Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("count", [1, 2, 31])
def test_curves_are_written(tmp_path: Path, count: int) -> None:
    plot_curves(epochs(count), tmp_path)
    for name in ("graph_loss.png", "graph_accuracy.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400


def test_best_of_validation_and_last_of_test_are_named() -> None:
    assert legend(plots._curves(epochs(8), "loss")) == [
        "train",
        "validation: lowest 1.000, epoch 3",
        "test: last 1.500, epoch 8",
    ]
    assert legend(plots._curves(epochs(8), "accuracy"))[1:] == [
        "validation: best 80.0%, epoch 5",
        "test: last 33.0%, epoch 8",
    ]


def test_only_the_splits_that_were_scored_are_drawn() -> None:
    rows = [{"epoch": 1, "train_loss": 0.5, "validation_loss": None}]
    assert legend(plots._curves(rows, "loss")) == ["train"]


def test_axis_of_near_equal_values_is_neither_blown_up_nor_beyond_what_can_be() -> None:
    assert plots._limits(0.0, 0.01, largest=1.0) == pytest.approx((-0.004, 0.055))
    assert plots._limits(0.2, 3.2, largest=math.inf) == (0.2, 3.2)
    rows = [{"epoch": epoch, "train_loss": 0.5, "train_accuracy": 1.0} for epoch in (1, 2)]
    low, high = plots._curves(rows, "loss").axes[0].get_ylim()
    assert high - low == pytest.approx(0.1)
    assert 1 < plots._curves(rows, "accuracy").axes[0].get_ylim()[1] < 1.01


def test_names_are_drawn_literally_or_by_number() -> None:
    figure, axes = plots._figure(3, 2)
    plots._name_classes(axes, ["$a$", "猫", "x" * 21], size=8)
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["$a$", "class 1", "x" * 19 + "…"]
    figure.draw_without_rendering()
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        assert not label.get_parse_math()


@pytest.mark.parametrize("n_classes", [2, 10, 37, 131])
def test_confusion_is_drawn_for_few_and_many_classes(tmp_path: Path, n_classes: int) -> None:
    path = tmp_path / "confusion.png"
    plot_confusion(scored([f"class {y}" for y in range(n_classes)]), "a $note\n", path)
    with Image.open(path) as picture:
        assert min(picture.size) > 400
        assert max(picture.size) < 3500


def test_odd_names_can_be_drawn(tmp_path: Path) -> None:
    plot_confusion(scored(["[x]", "$\\frac$", "猫\t"]), "a $note\n", tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").exists()


def test_calibration_is_drawn(tmp_path: Path) -> None:
    plot_calibration(scored(["a", "b", "c"], count=1), "note", tmp_path / "one.png")
    plot_calibration(scored(["a", "b", "c"]), "note", tmp_path / "many.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "many.png").read_bytes()


def test_plots_that_cannot_be_drawn_or_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no epoch to plot"):
        plot_curves([], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        plot_curves(epochs(2), tmp_path / "file")
    taken = tmp_path / "taken.png"
    taken.mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        plot_calibration(scored(["a", "b"]), "note", taken)


def test_matplotlibs_settings_do_not_change(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_curves(epochs(3), tmp_path)
    plot_confusion(scored(["a", "b"]), "a $note\n", tmp_path / "confusion.png")
    assert dict(mpl.rcParams) == before


def test_a_plot_names_the_run_literally() -> None:
    (axes,) = plots._curves(epochs(2), "loss", "a $b$\n").axes
    (note,) = axes.texts
    assert note.get_text() == "a $b$�"
    assert not note.get_parse_math()


def test_bins_of_few_images_are_pale() -> None:
    logits_BY = torch.tensor([[4.0, 0, 0]] * 198 + [[0.5, 0, 0]])
    metrics = measure(logits_BY, torch.zeros(199, dtype=torch.long), classes=["a", "b", "c"])
    _, axes = plots._figure(3, 2)
    plots._draw_reliability(axes, metrics)
    accuracy = axes.containers[0]
    assert accuracy.get_label() == "accuracy (pale: below 1% of the images)"
    assert [bar.get_facecolor()[3] for bar in accuracy] == [1, 0.3]


def test_a_count_stands_in_the_row_of_the_true_class(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    guesses, labels = torch.tensor([0, 1, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 2])
    metrics = measure(torch.eye(3)[guesses], labels, classes="abc")
    plot_confusion(metrics, "", tmp_path / "x.png")
    axes = figures[0].axes[0]
    counts = {t.get_position()[::-1]: t.get_text() for t in axes.texts if t.get_text().isdigit()}
    assert counts == {(0, 0): "1", (0, 1): "2", (1, 1): "1", (2, 2): "1"}  # row, column
    np.testing.assert_allclose(
        axes.images[0].get_array(), [[1 / 3, 2 / 3, 0], [0, 1, 0], [0, 0, 1]]
    )
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_bars_are_as_high_as_the_accuracy_and_the_gap_reaches_the_confidence() -> None:
    logits_BY = torch.tensor([[2.0, 0, 0]] * 4)
    metrics = measure(logits_BY, torch.tensor([0, 1, 1, 1]), classes="abc")
    _, axes = plots._figure(3, 2)
    plots._draw_reliability(axes, metrics)
    (accuracy,), (gap,) = axes.containers
    confidence = logits_BY[0].softmax(0)[0].item()
    assert accuracy.get_height() == pytest.approx(0.25)
    assert gap.get_y() + gap.get_height() == pytest.approx(confidence)
