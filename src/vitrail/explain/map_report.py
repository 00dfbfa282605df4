"""Scores of explanation methods as a table for the terminal and as a picture."""

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vitrail.errors import DataError
from vitrail.evaluation.report import (
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    make_table,
    percent,
    save_figure,
    tidy,
    write_title,
)
from vitrail.explain.best_order import Ceiling
from vitrail.explain.map_metrics import MEASURES, Estimate, Score, paired_difference
from vitrail.explain.sanity import LEAST_SHARE, TOO_SIMILAR, Sanity, Shortcut
from vitrail.explain.stored_scores import Verdict

YES, NO = "✓", "✗"
COLORS = (BLUE, ORANGE, GREEN, SKY, "#CC79A7", "#E69F00", "#000000", "#882255", "#999933")
"""Okabe and Ito's palette and two of Tol's, in the order of the methods; the controls are gray."""
CONTROL_STYLES = {"random": ":", "blurred random": "-.", "center": "--"}
OBJECT_TITLES = {
    "pointing": "Pointing game: highest point on the object",
    "mass": "Share of the map on the object",
}
"""The measures that are percentages."""
CURVES = ("deletion_mean", "insertion_mean", "deletion_blur", "insertion_blur")
FILL_NAMES = {"mean": "the mean color", "blur": "a blurred picture"}


def score_table(
    scores: Sequence[Score], verdict: Verdict | None = None, ceiling: Ceiling | None = None
) -> RenderableType:
    """Return every measure with its interval, best SRG first, and what beats the controls.

    With a verdict, methods that fail a test are marked; a ceiling gets its own row.
    """
    scores = sorted(scores, key=lambda score: (score.is_control, -score.estimates["srg"].mean))
    failed = {badge.method for badge in verdict.badges if badge.failures} if verdict else set()
    tables = _tables(scores, failed, ceiling)
    tables += [_difference_table(scores)] if scores else []
    words = _how_to_read(scores, failed, ceiling)
    return Group(*tables, Text(words, style="dim"), "", _verdicts(scores))


def trust_text(verdict: Verdict) -> RenderableType:
    """Return the tests that methods fail, and which map to trust."""
    text = Text()
    for badge in verdict.badges:
        if badge.failures:
            text.append(f"{badge.method} fails: {', '.join(badge.failures)}\n", style="red")
    return text.append(verdict.trust, style="bold")


def shortcut_table(found: Shortcut) -> RenderableType:
    """Return how much each map shows the planted mark, and what the mark is worth to the model."""
    own, none, another = (percent(found.accuracies[name]) for name in ("own", "none", "another"))
    words = (
        f"Accuracy with the mark {own}, without {none}, with another class's mark {another}. "
        f"Maps of {found.decided} images predicted as the mark's class: a uniform map has "
        f"{percent(found.even)} of its mass on the mark. 95% intervals."
    )
    table = make_table("Does the map find the mark that was planted in training?")
    table.add_column("method", no_wrap=True)
    table.add_column("share on\nthe mark", justify="right", no_wrap=True)
    for method, share in sorted(found.shares.items(), key=lambda item: -item[1].mean):
        cell = Text(percent(share.mean), style="bold")
        cell.append(f"\n{100 * share.low:.1f}–{100 * share.high:.1f}", style="not bold dim")
        table.add_row(method, cell)
    return Group(*([table] if found.shares else []), Text(words, style="dim"))


def plot_scores(path: Path, scores: Sequence[Score]) -> None:
    """Draw the deletion and insertion curves and, if there are masks, the measures on objects.

    Raises:
        DataError: there are no scores.
        OutputError: the file cannot be written.
    """
    if not scores:
        raise DataError("there is no score to draw: give at least one method")
    masked = "pointing" in scores[0].estimates
    figure = Figure(figsize=(10, 11.5 if masked else 8), layout="constrained")
    grid = figure.add_gridspec(3 if masked else 2, 2)
    for index, name in enumerate(CURVES):
        _draw_curves(figure.add_subplot(grid[index // 2, index % 2]), name, scores)
    if masked:
        for index, name in enumerate(OBJECT_TITLES):
            _draw_estimates(figure.add_subplot(grid[2, index]), name, scores)
    handles = figure.axes[0].get_lines()
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def plot_ranking(path: Path, verdict: Verdict, controls: Mapping[str, Estimate]) -> None:
    """Draw the SRG of each method and control with its interval, and the tests that methods fail.

    Raises:
        OutputError: the file cannot be written.
    """
    names = [*(badge.method for badge in verdict.badges), *controls]
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for row, badge in enumerate(verdict.badges):
        color = ORANGE if badge.failures else BLUE
        _draw_interval(axes, row, Estimate(badge.srg, badge.low, badge.high), color, "o")
        failed = ", ".join(words.split()[-1] for words in badge.failures)  # control, model, class
        axes.annotate(
            f"{NO} {failed}" if failed else YES, (badge.high, row), (8, 0),
            textcoords="offset points",
            va="center", size=9, color=color,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    for row, srg in enumerate(controls.values(), len(verdict.badges)):
        _draw_interval(axes, row, srg, "#888888", "D")
    axes.axvline(max(srg.mean for srg in controls.values()), color="#888888", linewidth=1)
    axes.set_yticks(range(len(names)), [*names[: len(verdict.badges)], *map(_control, controls)])
    axes.set_ylim(len(names) - 0.5, -0.5)
    measured = f"SRG (insertion minus deletion) on {verdict.images:,} images"
    words = f"{measured}, 95% intervals; line: best control"
    axes.set(xlabel=words, xlim=(None, max(1, axes.dataLim.x1 + 0.1)))
    note = f"{NO} control: no better than a control; {NO} model, class: does not depend on it"
    write_title(axes, "How faithful is each method to this model? Higher is better", note)
    tidy(axes)
    save_figure(figure, path)


def sanity_table(checks: Sequence[Sanity]) -> RenderableType:
    """Return which methods depend on the model's weights, and on the class."""
    table = make_table("Does the map depend on the model, and on the class?")
    table.add_column("method", no_wrap=True)
    for title in ("similarity with\nrandom weights", "share in the\ntile of the class"):
        table.add_column(title, justify="right", no_wrap=True)
    for check in checks:
        cells = []
        last = list(check.similarity.values())[-1]
        cells.append(_with_mark(f"{last.mean:.2f}", check.depends_on_model))
        if check.in_tile is None:
            cells.append(Text("–"))
        else:
            cells.append(_with_mark(percent(check.in_tile.mean), bool(check.depends_on_class)))
        table.add_row(check.method, *cells)
    words = (
        "Similarity: rank correlation of the maps before and after all weights were randomized; "
        f"{NO} if its 95% interval reaches {TOO_SIMILAR}. Share: of a class's map in that class's "
        "quarter of a mosaic of four images, 25% for a uniform map; "
        f"{NO} if its 95% interval reaches {LEAST_SHARE:.0%}, – with fewer than ten mosaics."
    )
    return Group(table, Text(words, style="dim"))


def _with_mark(value: str, good: bool) -> Text:
    return Text(value, style="bold").append(f" {YES if good else NO}", "green" if good else "red")


def plot_randomization(path: Path, checks: Sequence[Sanity]) -> None:
    """Draw how similar each method's maps stay while the weights are randomized.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, check in enumerate(checks):
        means = [estimate.mean for estimate in check.similarity.values()]
        color, style = _line(index)
        axes.plot(list(check.similarity), means, f"o{style}", color=color, label=check.method)
    axes.axhline(0, color="#888888", linewidth=1)
    axes.set(xlabel="randomized, from left to right", ylabel="rank correlation")
    axes.set_ylim(min(-0.3, axes.dataLim.y0 - 0.05), 1.02)
    write_title(axes, "Similarity to the trained model's maps: close to 0 is good")
    tidy(axes)
    figure.legend(loc="outside right center", frameon=False)
    save_figure(figure, path)


def _tables(
    scores: Sequence[Score], failed: Collection[str], ceiling: Ceiling | None
) -> list[Table]:
    names = list(scores[0].estimates) if scores else []
    on_object = [name for name in names if name in OBJECT_TITLES]
    areas = [name for name in names if name.startswith(("deletion", "insertion"))]
    titled = (
        ("Scores", [name for name in names if name not in (*on_object, *areas)]),
        ("On the object", on_object),
        ("Area under the probability of the class", areas),
    )
    return [_table(title, some, scores, failed, ceiling) for title, some in titled if some]


def _table(
    title: str,
    names: Sequence[str],
    scores: Sequence[Score],
    failed: Collection[str],
    ceiling: Ceiling | None,
) -> Table:
    with_ceiling = "srg" in names and ceiling is not None
    table = make_table(title)
    table.collapse_padding = True  # four columns of intervals then fit 80 characters
    table.add_column("method", no_wrap=True)
    for name in names:
        good = "high is good" if MEASURES[name].higher_is_better else "low is good"
        label = MEASURES[name].label.replace(", ", ",\n")
        table.add_column(f"{label}\n{good}", justify="right", no_wrap=True)
    for column in ("of the\nceiling", "ms per\nimage") if with_ceiling else ():
        table.add_column(column, justify="right", no_wrap=True)
    for score in scores:
        label_text = Text(_label(score).replace(" (", "\n("))
        if score.method in failed:
            label_text.append(f" {NO}", style="red")
        cells = [_cell(score, name) for name in names]
        if with_ceiling and ceiling:
            cost = "" if score.is_control else f"{score.milliseconds:.1f}"
            cells += [Text(percent(ceiling.shares[score.method])), Text(cost)]
        table.add_row(label_text, *cells, style="dim" if score.is_control else "")
    if with_ceiling and ceiling:
        mean, low, high = ceiling.srg
        srg = Text(f"{mean:.3f}", style="bold").append(f"\n{low:.3f}–{high:.3f}", "not bold dim")
        cells = [srg if name == "srg" else Text("") for name in names]
        table.add_row(f"ceiling, {ceiling.n} images", *cells, percent(1), style="dim")
    return table


def _difference_table(scores: Sequence[Score]) -> Table:
    """Return the paired differences of each method's SRG to the next method, and best control."""
    methods = [score for score in scores if not score.is_control]
    controls = [score for score in scores if score.is_control]
    table = make_table("Differences of SRG, image by image")
    table.add_column("method", no_wrap=True)
    for column in ("above the next\nmethod", "above the best\ncontrol"):
        table.add_column(column, justify="right", no_wrap=True)
    for score, following in zip_longest(methods, methods[1:]):
        others = [following, *controls[:1]]
        table.add_row(score.method, *(_difference(score, other) for other in others))
    return table


def _difference(one: Score, other: Score | None) -> Text:
    if other is None:
        return Text("")
    mean, low, high = paired_difference(one, other)
    return Text(f"{mean:.3f}", style="bold").append(f"\n{low:.3f} to {high:.3f}", "not bold dim")


def _label(score: Score) -> str:
    return _control(score.method) if score.is_control else score.method


def _control(name: str) -> str:
    return f"{name} (control)"


def _cell(score: Score, name: str) -> Text:
    mean, low, high = score.estimates[name]
    if name in OBJECT_TITLES:
        value, interval = percent(mean), f"{100 * low:.1f}–{100 * high:.1f}"
    else:
        value, interval = f"{mean:.3f}", f"{low:.3f}–{high:.3f}"
    cell = Text(value, style="bold")
    if not score.is_control:
        beats = score.beats[name]
        cell.append(f" {YES if beats else NO}", style="green" if beats else "red")
    return cell.append(f"\n{interval}", style="not bold dim")


def _how_to_read(scores: Sequence[Score], failed: Collection[str], ceiling: Ceiling | None) -> str:
    if not scores:
        return "no method was scored"
    intervals = "Student's"
    if "pointing" in scores[0].estimates:
        intervals = "Wilson's for the pointing game, Student's for the rest"
    words = (
        f"{scores[0].n:,} images, each explained for its predicted class. Second lines: 95% "
        f"intervals ({intervals}). {YES} significantly better than all controls, {NO} "
        "not: paired t tests over the images, 5% error over all marks together (Bonferroni)."
    )
    if failed:
        words += f" {NO} after a name: the method fails a test (below)."
    if ceiling:
        words += (
            " Ceiling: the best order that a greedy search finds, on the first "
            f"{ceiling.n} images; the methods' shares of it are on the same images."
        )
    return words


def _verdicts(scores: Sequence[Score]) -> Text:
    """State for each method whether it beats the controls, and by which measures it does not."""
    text = Text()
    for score in scores:
        if score.is_control:
            continue
        missed = [MEASURES[name].label for name, beats in score.beats.items() if not beats]
        if not missed:
            text.append(f"{score.method} beats all controls by every measure\n")
        elif len(missed) == len(score.beats):
            text.append(f"{score.method} does not beat the controls by any measure\n", style="red")
        else:
            words = " · ".join(missed)
            text.append(f"{score.method} does not beat the controls by: {words}\n", style="yellow")
    text.rstrip()
    return text


def _styles(scores: Sequence[Score]) -> list[tuple[str, str]]:
    """Return each score's color and line style."""
    methods = [score.method for score in scores if not score.is_control]
    return [
        ("#888888", CONTROL_STYLES[score.method])
        if score.is_control
        else _line(methods.index(score.method))
        for score in scores
    ]


def _line(index: int) -> tuple[str, str]:
    """Return the color and line style of the method with this number."""
    return COLORS[index % len(COLORS)], ("-", "--", ":")[index // len(COLORS) % 3]


def _draw_curves(axes: Axes, name: str, scores: Sequence[Score]) -> None:
    kind, fill = name.split("_")
    for score, (color, style) in zip(scores, _styles(scores), strict=True):
        axes.plot(
            score.shares, score.curves[name], style, color=color, label=_label(score),
            linewidth=1.5 if score.is_control else 2,
        )  # fmt: skip
    verb = "replaced by" if kind == "deletion" else "inserted into"
    better = "higher" if MEASURES[name].higher_is_better else "lower"
    axes.set(
        xlabel=f"patches {verb} {FILL_NAMES[fill]}", ylabel="probability of the class",
        xlim=(0, 1), ylim=(0, 1),
    )  # fmt: skip
    write_title(axes, f"{kind.capitalize()}, {fill} fill: {better} is better")
    tidy(axes)
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def _draw_interval(axes: Axes, row: int, value: Estimate, color: str, marker: str) -> None:
    spread = [[max(0.0, value.mean - value.low)], [max(0.0, value.high - value.mean)]]
    axes.errorbar(value.mean, row, xerr=spread, fmt=marker, color=color, capsize=3)


def _draw_estimates(axes: Axes, name: str, scores: Sequence[Score]) -> None:
    for row, (score, (color, _)) in enumerate(zip(scores, _styles(scores), strict=True)):
        _draw_interval(axes, row, score.estimates[name], color, "D" if score.is_control else "o")
    best_control = max(score.estimates[name].mean for score in scores if score.is_control)
    axes.axvline(best_control, color="#888888", linewidth=1, linestyle="-", zorder=0)
    axes.set_yticks(range(len(scores)), [score.method for score in scores])
    words = f"{scores[0].n:,} images; bars: 95% intervals; line: the best control"
    axes.set(xlabel=words, xlim=(0, 1.02))
    axes.set_ylim(len(scores) - 0.5, -0.5)
    write_title(axes, OBJECT_TITLES[name])
    tidy(axes)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
