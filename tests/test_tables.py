import io

import pytest
import torch
from rich.console import Console, RenderableType

from vitrail.data.shapes import CLASSES
from vitrail.errors import printable
from vitrail.evaluation.metrics import Metrics, measure
from vitrail.evaluation.report import confusion_table, metrics_table, percent

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def scored(classes: list[str], images_each: int = 3) -> Metrics:
    """The first image of each class is classified as the next class, the others correctly."""
    labels = torch.arange(len(classes)).repeat_interleave(images_each)
    guesses = labels.clone()
    guesses[::images_each] = (labels[::images_each] + 1) % len(classes)
    return measure(torch.eye(len(classes))[guesses], labels, classes=classes)


def printed(table: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(table)
    return console.file.getvalue()


def test_overall_and_class_figures_are_printed() -> None:
    metrics = measure(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 1, 1]), classes=["a", "b", "c"])
    lines = [line.split() for line in printed(metrics_table(metrics)).splitlines()]
    assert ["accuracy", "66.67%", "of", "3", "images;"] in [line[:5] for line in lines]
    assert ["a", "50.0%", "100.0%", "1"] in lines
    assert ["b", "100.0%", "50.0%", "2"] in lines
    assert ["c", "–", "–", "0"] in lines
    assert "top-5" not in printed(metrics_table(metrics))
    assert "top-5 accuracy" in printed(metrics_table(scored(CIFAR10)))


def test_ten_classes_fit_eighty_columns_uncut() -> None:
    text = printed(confusion_table(scored(CIFAR10, 1009)))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = {cells[0]: cells[1:] for line in text.splitlines() if (cells := line.split())}
    assert rows["bird"] == ["·", "·", "1008", "1", *"······"]
    assert rows["truck"] == ["1", *"········", "1008"]
    assert all(len(rows[name]) == 10 for name in CIFAR10)


def test_short_names_are_not_broken() -> None:
    names = tuple(CLASSES)
    words = printed(confusion_table(scored(names, 20))).split()
    assert words.count("circle") == words.count("square") == 2


def test_many_classes_show_the_most_common_confusions_and_the_lowest_recalls() -> None:
    classes = [f"kind-{y}" for y in range(23)]
    labels = torch.tensor([4, 4, 4, 9, 9, 7])
    guesses = torch.tensor([6, 6, 4, 2, 9, 7])
    metrics = measure(torch.eye(23)[guesses], labels, classes=classes)
    pairs = [line.split() for line in printed(confusion_table(metrics)).splitlines()]
    assert pairs[-3:-1] == [
        ["kind-4", "kind-6", "2", "66.7%"],
        ["kind-9", "kind-2", "1", "50.0%"],
    ]
    lowest = printed(metrics_table(metrics))
    assert "3 of 23 classes, lowest recall first" in lowest
    assert lowest.index("kind-4") < lowest.index("kind-9") < lowest.index("kind-7")
    assert "kind-2 " not in lowest


@pytest.mark.parametrize("repeat", [1, 9])
def test_names_are_shown_literally(repeat: int) -> None:
    metrics = scored(["[red]x[/red]", "$a$", "tab\t\x1b[7m"] * repeat)
    for table in (metrics_table(metrics), confusion_table(metrics)):
        text = printed(table, width=120)
        assert any(line.startswith(" [red]x[/red] ") for line in text.splitlines())
        assert "$a$" in text
        assert "tab��[7m" in text
        assert "\x1b" not in text


def test_words() -> None:
    assert printable("a\nb\u202ec\udcffé猫") == "a�b�c�é猫"
    assert percent(None) == "–"
    assert percent(0.98765, 2) == "98.77%"
