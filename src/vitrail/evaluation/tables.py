"""Metrics as tables for the terminal."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vitrail.errors import printable

if TYPE_CHECKING:  # metrics need torch, tables do not
    from vitrail.evaluation.metrics import Metrics

MATRIX_CLASSES = 12
"""Columns that fit in 80 characters; with more, the most common confusions are listed."""
LISTED_CLASSES = 20
"""With more classes, only those with the lowest recall are listed."""
LISTED_LINES = 10
"""Length of the list of classes with the lowest recall, and of the most common confusions."""


def percent(share: float | None, digits: int = 1) -> str:
    """Format a fraction as a percentage; None is a dash."""
    return "–" if share is None else f"{share:.{digits}%}"


def metrics_table(metrics: "Metrics") -> RenderableType:
    """Return the overall metrics, and precision, recall and number of images per class."""
    return Group(_overall(metrics), _per_class(metrics))


def confusion_table(metrics: "Metrics") -> RenderableType:
    """Return the confusion matrix, or with many classes the most common confusions."""
    few = len(metrics.classes) <= MATRIX_CLASSES
    return _matrix(metrics) if few else _common_confusions(metrics)


def _overall(metrics: "Metrics") -> Table:
    low, high = metrics.accuracy_interval
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    table.add_column(style="dim")
    interval = f"of {metrics.images:,} images; 95% interval {percent(low)} to {percent(high)}"
    if metrics.tta:
        interval += "; mean of six views (test-time augmentation)"
    table.add_row("accuracy", percent(metrics.accuracy, 2), interval)
    if metrics.top5_accuracy is not None:
        note = "the true class is among the five most probable"
        table.add_row("top-5 accuracy", percent(metrics.top5_accuracy, 2), note)
    table.add_row("loss", f"{metrics.loss:.4f}", "cross-entropy in nats")
    error = percent(metrics.expected_calibration_error, 2)
    table.add_row("calibration error", error, "mean gap between confidence and accuracy")
    table.add_row("precision", percent(metrics.macro_precision, 2), "mean over the classes")
    table.add_row("recall", percent(metrics.macro_recall, 2), "mean over the classes")
    return table


def _per_class(metrics: "Metrics") -> Table:
    shown = list(range(len(metrics.classes)))
    title = None
    if len(shown) > LISTED_CLASSES:
        with_images = [y for y in shown if metrics.support_Y[y]]
        shown = sorted(with_images, key=lambda y: metrics.recall_Y[y] or 0.0)[:LISTED_LINES]
        title = f"{len(shown)} of {len(metrics.classes)} classes, lowest recall first"
    table = _table(title)
    table.add_column("class", max_width=36, no_wrap=True)
    for name in ("precision", "recall", "images"):
        table.add_column(name, justify="right")
    for y in shown:
        table.add_row(
            Text(printable(metrics.classes[y])),
            percent(metrics.precision_Y[y]),
            percent(metrics.recall_Y[y]),
            f"{metrics.support_Y[y]:,}",
        )
    return table


def _matrix(metrics: "Metrics") -> Table:
    table = _table("Rows: the true class. Columns: the predicted class.")
    table.padding = 0  # the box already separates the columns by a space
    table.add_column("", max_width=14, no_wrap=True)
    digits = len(str(max(map(max, metrics.confusion_YY))))
    width = max(digits, min(14, 64 // len(metrics.classes) - 1))
    for name in metrics.classes:
        # A long name wraps instead of widening its column.
        header = Text(printable(name), overflow="fold")
        table.add_column(header, justify="right", vertical="bottom", width=width)
    for y, counts in enumerate(metrics.confusion_YY):
        cells = [_cell(count, right=y == guess) for guess, count in enumerate(counts)]
        table.add_row(Text(printable(metrics.classes[y])), *cells)
    return table


def _cell(count: int, *, right: bool) -> Text:
    if right:
        return Text(str(count), style="bold green")
    return Text(str(count)) if count else Text("·", style="dim")


def _common_confusions(metrics: "Metrics") -> Table:
    wrong = [
        (count, true, guess)
        for true, counts in enumerate(metrics.confusion_YY)
        for guess, count in enumerate(counts)
        if count and true != guess
    ]
    table = _table("The most common confusions")
    table.add_column("true class", max_width=30, no_wrap=True)
    table.add_column("predicted class", max_width=30, no_wrap=True)
    table.add_column("images", justify="right")
    table.add_column("share", justify="right")
    for count, true, guess in sorted(wrong, key=lambda pair: -pair[0])[:LISTED_LINES]:
        names = [Text(printable(metrics.classes[y])) for y in (true, guess)]
        table.add_row(*names, f"{count:,}", percent(count / metrics.support_Y[true]))
    return table


def _table(title: str | None) -> Table:
    return Table(title=title, title_justify="left", title_style="", box=box.SIMPLE, pad_edge=False)
