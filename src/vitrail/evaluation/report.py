"""Metrics as tables for the terminal and as plots; the training curves.

The plots use matplotlib's Figure directly, never pyplot: no window, no global state.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vitrail.errors import DataError, VitrailError, printable
from vitrail.evaluation.metrics import Metrics
from vitrail.runtime.files import replace_file

Row = Mapping[str, Any]

MATRIX_CLASSES = 12
"""Columns that fit in 80 characters; with more, the most common confusions are listed."""
LISTED_CLASSES = 20
"""With more classes, only those with the lowest recall are listed."""
LISTED_LINES = 10
"""Length of the list of classes with the lowest recall, and of the most common confusions."""
# Okabe and Ito's palette, safe for color blindness.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
DARK, LIGHT = "#333333", "#E5E5E5"
SPLITS = {"train": BLUE, "validation": ORANGE, "test": GREEN}
MARKED_EPOCHS = 30
"""Up to this many epochs, each is marked with a dot."""
COUNTED_CLASSES = 120
"""With more classes, the cells of the confusion matrix are too small for counts and all names."""
SMALLEST_SPAN = 0.1
"""A vertical axis covers at least this range, so that nearly equal values look nearly equal."""
NAME_LENGTH = 20
"""Longer class names are truncated."""
NOTE_LENGTH = 80
"""Maximum length of the line below a title."""
FEW_IMAGES = 0.01
"""A calibration bin with a smaller share of the images is drawn pale."""


# Tables.


def percent(share: float | None, digits: int = 1) -> str:
    """Format a fraction as a percentage; None is a dash."""
    return "–" if share is None else f"{share:.{digits}%}"


def metrics_table(metrics: Metrics) -> RenderableType:
    """Return the overall metrics, and precision, recall and number of images per class."""
    return Group(_overall(metrics), _per_class(metrics))


def confusion_table(metrics: Metrics) -> RenderableType:
    """Return the confusion matrix, or with many classes the most common confusions."""
    few = len(metrics.classes) <= MATRIX_CLASSES
    return _matrix(metrics) if few else _common_confusions(metrics)


def _overall(metrics: Metrics) -> Table:
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
    note = "mean gap between confidence and accuracy"
    if metrics.temperature != 1:
        before = percent(metrics.calibration_error_before, 2)
        undone = f", label smoothing {metrics.smoothing:g} undone" if metrics.smoothing else ""
        note += f"; {before} before (temperature {metrics.temperature:.2f}{undone})"
    table.add_row("calibration error", error, note)
    table.add_row("precision", percent(metrics.macro_precision, 2), "mean over the classes")
    table.add_row("recall", percent(metrics.macro_recall, 2), "mean over the classes")
    return table


def _per_class(metrics: Metrics) -> Table:
    shown = list(range(len(metrics.classes)))
    title = None
    if len(shown) > LISTED_CLASSES:
        with_images = [y for y in shown if metrics.support_Y[y]]
        shown = sorted(with_images, key=lambda y: metrics.recall_Y[y] or 0.0)[:LISTED_LINES]
        title = f"{len(shown)} of {len(metrics.classes)} classes, lowest recall first"
    table = make_table(title)
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


def _matrix(metrics: Metrics) -> Table:
    table = make_table("Rows: the true class. Columns: the predicted class.")
    table.padding = 0  # the box already separates the columns by a space
    table.add_column("", max_width=14, no_wrap=True)
    digits = len(str(max(map(max, metrics.confusion_YY))))
    lengths = [cell_len(printable(name)) for name in metrics.classes]
    free = 79 - min(14, max(lengths))
    width = max(digits, min(14, max(lengths), free // len(lengths) - 1))
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


def _common_confusions(metrics: Metrics) -> Table:
    wrong = [
        (count, true, guess)
        for true, counts in enumerate(metrics.confusion_YY)
        for guess, count in enumerate(counts)
        if count and true != guess
    ]
    table = make_table("The most common confusions")
    table.add_column("true class", max_width=30, no_wrap=True)
    table.add_column("predicted class", max_width=30, no_wrap=True)
    table.add_column("images", justify="right")
    table.add_column("share", justify="right")
    for count, true, guess in sorted(wrong, key=lambda pair: -pair[0])[:LISTED_LINES]:
        names = [Text(printable(metrics.classes[y])) for y in (true, guess)]
        table.add_row(*names, f"{count:,}", percent(count / metrics.support_Y[true]))
    return table


def make_table(title: str | None) -> Table:
    """Return an empty table in the package's style."""
    return Table(title=title, title_justify="left", title_style="", box=box.SIMPLE, pad_edge=False)


# Plots.


def plot_curve(rows: Sequence[Row], quantity: str, note: str, path: Path) -> None:
    """Plot the loss or the accuracy over the epochs, from the rows of ``metrics.jsonl``.

    A row has ``epoch`` (from 1) and ``SPLIT_loss`` and ``SPLIT_accuracy`` for each evaluated split
    (train, validation, test). The best epoch on validation is marked; on test, which must not
    select an epoch, the last.

    Raises:
        DataError: there are no rows.
        OutputError: the folder cannot be written.
    """
    if not rows:
        raise DataError("there is no epoch to plot: train for at least one")
    save_figure(_curves(rows, quantity, note), path)


def plot_confusion(metrics: Metrics, note: str, path: Path) -> None:
    """Plot the confusion matrix: counts, colored by their fraction of the true class.

    A name that matplotlib's own font cannot draw is shown as its class index, from 0.

    Raises:
        OutputError: the file cannot be written.
    """
    n_classes = len(metrics.classes)
    cell = min(0.5, max(0.2, 10 / n_classes), 24 / n_classes)
    side = max(4.5, 2.6 + cell * n_classes)
    figure, axes = _figure(side + 1, side)
    shares_YY = [[n / max(1, sum(counts)) for n in counts] for counts in metrics.confusion_YY]
    # The square root makes a confusion of one in a hundred visible next to the diagonal.
    image = axes.imshow(shares_YY, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    if n_classes <= COUNTED_CLASSES:
        _write_counts(axes, metrics, shares_YY, size=min(10.0, cell * 26))
    _name_classes(axes, metrics.classes, size=max(6.5, min(10.0, cell * 32)))
    axes.set(xlabel="predicted class", ylabel="true class")
    write_title(axes, f"Accuracy {percent(metrics.accuracy, 2)} on {metrics.images:,} images", note)
    shrink, ticks = min(0.6, 6 / side), (0, 0.05, 0.2, 0.5, 1)
    bar = figure.colorbar(image, ax=axes, shrink=shrink, aspect=25, ticks=ticks)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    bar.set_label("fraction of the true class")
    save_figure(figure, path)


def plot_calibration(metrics: Metrics, note: str, path: Path) -> None:
    """Plot the reliability diagram above a histogram of confidence.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = Figure(figsize=(6, 7), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    _draw_reliability(upper, metrics)
    error = percent(metrics.expected_calibration_error, 2)
    write_title(upper, f"Expected calibration error {error}", note)
    lefts = [bin.low for bin in metrics.calibration]
    shares = [bin.share for bin in metrics.calibration]
    lower.bar(lefts, shares, 1 / len(lefts), align="edge", color=SKY, edgecolor="white")
    lower.set(xlabel="confidence (highest probability)", ylabel="fraction of images", xlim=(0, 1))
    for axes in (upper, lower):
        tidy(axes)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def _curves(rows: Sequence[Row], quantity: str, note: str = "") -> Figure:
    figure, axes = _figure(7, 4.5)
    for split in SPLITS:
        points = [
            (row["epoch"], row[f"{split}_{quantity}"])
            for row in rows
            if row.get(f"{split}_{quantity}") is not None
        ]
        if points:
            _draw_curve(axes, points, split, quantity)
    tidy(axes)
    axes.set(xlabel="epoch", ylabel="cross-entropy in nats" if quantity == "loss" else "")
    write_title(axes, quantity.capitalize(), note)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(_limits(*axes.get_ylim(), largest=math.inf if quantity == "loss" else 1.0))
    if quantity == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _limits(low: float, high: float, *, largest: float) -> tuple[float, float]:
    """Widen a narrow axis; clip it to 0 and the largest value, leaving room for a dot there."""
    spare = max(0.0, SMALLEST_SPAN - (high - low)) / 2
    room = 0.04 * (high - low + 2 * spare)
    return max(low - spare, -room), min(high + spare, largest + room)


def _draw_curve(axes: Axes, points: Sequence[tuple[Any, Any]], split: str, quantity: str) -> None:
    """Plot one line, with a ring around the epoch that the legend names."""
    color, label = SPLITS[split], split
    if split != "train":
        pick = min if quantity == "loss" else max
        epoch, value = pick(points, key=itemgetter(1)) if split == "validation" else points[-1]
        word = "last" if split == "test" else "lowest" if quantity == "loss" else "best"
        number = f"{value:.3f}" if quantity == "loss" else percent(value)
        label = f"{split}: {word} {number}, epoch {epoch}"
        axes.plot(epoch, value, "o", markersize=11, fillstyle="none", color=color)
    marker = "o" if len(points) <= MARKED_EPOCHS else ""
    axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=label)


def _draw_reliability(axes: Axes, metrics: Metrics) -> None:
    filled = [bin for bin in metrics.calibration if bin.share]
    filled.sort(key=lambda bin: bin.share, reverse=True)  # the legend has the first bar's color
    lefts, width = [bin.low for bin in filled], 1 / len(metrics.calibration)
    accuracies = [bin.accuracy or 0.0 for bin in filled]
    gaps = [(bin.confidence or 0.0) - (bin.accuracy or 0.0) for bin in filled]
    # Bins with few images say little.
    opacities = [1.0 if bin.share >= FEW_IMAGES else 0.3 for bin in filled]
    blue, orange = ([to_rgba(name, a) for a in opacities] for name in (SKY, ORANGE))
    bars: dict[str, Any] = {"align": "edge", "width": width}
    pale = f" (pale: below {FEW_IMAGES:.0%} of the images)" if min(opacities) < 1 else ""
    axes.bar(lefts, accuracies, color=blue, edgecolor="white", label=f"accuracy{pale}", **bars)
    bars |= {"facecolor": "none", "edgecolor": orange, "hatch": "///"}
    axes.bar(lefts, gaps, bottom=accuracies, label="gap to confidence", **bars)
    axes.plot((0, 1), (0, 1), "--", color=DARK, linewidth=1, label="perfect calibration")
    axes.set(ylabel="accuracy", ylim=(0, 1))


def _write_counts(axes: Axes, metrics: Metrics, shares_YY: Any, *, size: float) -> None:
    n_classes = len(shares_YY)
    edges = [y - 0.5 for y in range(n_classes + 1)]
    for lines in (axes.hlines, axes.vlines):
        lines(edges, -0.5, n_classes - 0.5, color=LIGHT, linewidth=0.5)
    for true, counts in enumerate(metrics.confusion_YY):
        for guess, count in enumerate(counts):
            if count:
                color = "white" if shares_YY[true][guess] > 0.3 else "black"
                axes.text(guess, true, str(count), ha="center", va="center", size=size, color=color)


def _name_classes(axes: Axes, classes: Sequence[str], *, size: float) -> None:
    shown = range(0, len(classes), math.ceil(len(classes) / COUNTED_CLASSES))
    names = [drawable(classes[y], NAME_LENGTH) for y in shown]
    names = [
        f"class {y}" if "\N{REPLACEMENT CHARACTER}" in name else name
        for y, name in zip(shown, names, strict=True)
    ]
    # By default a dollar sign in a name would start a formula.
    axes.set_xticks(shown, names, rotation=90, size=size, parse_math=False)
    axes.set_yticks(shown, names, size=size, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def drawable(text: str, length: int) -> str:
    """Return the first characters of a text; those that the plots' font lacks become U+FFFD."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    text = printable(text) if len(text) <= length else printable(text[: length - 1]) + "…"
    return "".join(
        character if font.get_char_index(ord(character)) else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def write_title(axes: Axes, title: str, note: str = "") -> None:
    """Set a left-aligned title, and a smaller line below it."""
    axes.set_title(title, loc="left", size=12, weight="bold", pad=24 if note else 10)
    axes.annotate(
        drawable(note, NOTE_LENGTH), (0, 1), (0, 9), xycoords="axes fraction",
        textcoords="offset points", size=9, color=DARK, parse_math=False,
    )  # fmt: skip


def tidy(axes: Axes) -> None:
    """Remove the top and right spines; draw a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Save a figure as a PNG file.

    Raises:
        OutputError: the file cannot be written.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.15)
    replace_file(path, file.getvalue())


def plot_run(
    rows: Sequence[Row], metrics: Metrics | None, folder: Path, data: str, smoothing: float
) -> list[str]:
    """Plot the curves and, given test metrics, what ``plot_metrics`` plots.

    Args:
        rows: one per epoch.
        metrics: those of the test split.
        folder: the run folder.
        data: name of the dataset.
        smoothing: the label smoothing, which the training loss includes.

    Returns:
        one line for each plot that failed, since a failed plot must not lose the numbers.
    """
    name = f"{folder.name}, {data}"
    smoothed = f"{name}; train: with label smoothing {smoothing:g}" if smoothing else name
    curves = {
        "graph_loss.png": partial(plot_curve, rows, "loss", smoothed),
        "graph_accuracy.png": partial(plot_curve, rows, "accuracy", name),
    }
    problems = draw_each(curves, folder)
    return problems + (plot_metrics(metrics, folder, f"{name}, test") if metrics else [])


def plot_metrics(metrics: Metrics, folder: Path, note: str) -> list[str]:
    """Plot the confusion matrix and the reliability diagram; return a line for each that failed.

    ``note`` names the model and the images, under the titles.
    """
    plots = {
        "confusion_matrix.png": partial(plot_confusion, metrics, note),
        "calibration.png": partial(plot_calibration, metrics, note),
    }
    return draw_each(plots, folder)


def draw_each(draw: Mapping[str, Callable[[Path], object]], folder: Path) -> list[str]:
    """Save each plot in the folder; return one line for each that failed."""
    problems = []
    for name, function in draw.items():
        try:
            function(folder / name)
        except VitrailError as error:
            problems.append(str(error))
        except Exception as error:  # noqa: BLE001 (fonts, memory, anything in matplotlib)
            reason = (str(error).splitlines() or [""])[0]
            problems.append(f"{folder / name} could not be drawn: {type(error).__name__}: {reason}")
    return problems
