"""The results of a study: a table, a CSV file, a plot of importances, and flags."""

import csv
import dataclasses
import io
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from vitrail.config.settings import Config
from vitrail.errors import printable
from vitrail.evaluation.plots import BLUE, save_figure, tidy, write_title
from vitrail.evaluation.tables import percent
from vitrail.optional import import_optional
from vitrail.runtime.files import replace_file

LISTED_TRIALS = 20
"""Number of trials in the table; the CSV file has all."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one trial."""

    number: int
    state: str
    accuracy: float | None
    """Best validation accuracy so far; None before the end of the first epoch."""
    epochs: int
    params: Mapping[str, Any]
    folder: str
    error: str

    @classmethod
    def of(cls, trial: Any) -> "Outcome":
        """Return the result of an optuna FrozenTrial."""
        accuracies = trial.intermediate_values
        return cls(
            number=trial.number,
            state=trial.state.name.lower(),
            accuracy=max(accuracies.values(), default=None),
            epochs=max(accuracies, default=0),
            params=dict(trial.params),
            folder=trial.user_attrs.get("folder", ""),
            error=trial.user_attrs.get("error", ""),
        )

    def line(self) -> str:
        """Return a description of one line."""
        settings = ", ".join(
            f"{name} {_format_value(value)}" for name, value in self.params.items()
        )
        end = f": {self.error}" if self.error else ""
        return (
            f"trial {self.number} {self.state} after {self.epochs} epochs, "
            f"validation {percent(self.accuracy, 2)}: {settings}{end}"
        )


def outcomes(study: Any) -> list[Outcome]:
    """Return all started trials of a study: completed ones first, sorted by accuracy."""
    all_trials = [
        Outcome.of(t) for t in study.get_trials(deepcopy=False) if t.state.name != "WAITING"
    ]
    return sorted(
        all_trials,
        key=lambda each: (each.state != "complete", -(each.accuracy or 0.0), each.number),
    )


def _format_value(value: Any) -> str:
    """Return a value as text, floats with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trial_table(trials: Sequence[Outcome]) -> Table:
    """Return a table of the best trials, one per row."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    reasons = any(trial.error for trial in trials)
    table = Table(show_edge=False, pad_edge=False)
    for column in ("trial", "state", "validation", "epochs", *names):
        table.add_column(column, justify="left" if column == "state" else "right")
    if reasons:
        table.add_column("reason", overflow="fold")
    for trial in trials[:LISTED_TRIALS]:
        values = [
            _format_value(trial.params[name]) if name in trial.params else "" for name in names
        ]
        row = [str(trial.number), trial.state, percent(trial.accuracy, 2), str(trial.epochs)]
        cells = [*row, *values, *([trial.error] if reasons else [])]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def write_csv(trials: Sequence[Outcome], path: Path) -> None:
    """Write all trials, one per row."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", "state", "validation_accuracy", "epochs", *names, "folder", "error"])
    for trial in trials:
        values = [trial.params.get(name, "") for name in names]
        start = [trial.number, trial.state, trial.accuracy, trial.epochs]
        rows.writerow([*start, *values, trial.folder, trial.error])
    replace_file(path, text.getvalue().encode())


def importances(study: Any) -> dict[str, float]:
    """Return the relative importance of each setting; empty if it cannot be computed.

    Source: Watanabe et al. 2023, "PED-ANOVA", arXiv:2304.10255.
    """
    optuna = import_optional("optuna")
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len({trial.value for trial in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, float] = optuna.importance.get_param_importances(study)
    return found


def plot_importances(shares: Mapping[str, float], trials: int, path: Path) -> None:
    """Plot the settings' importances as bars, the largest on top."""
    names = sorted(shares, key=lambda name: shares[name])
    figure = Figure(figsize=(7, 1.4 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [shares[name] for name in names], color=BLUE)
    axes.set(xlabel=f"relative importance ({trials} completed trials)", xlim=(0, 1))
    tidy(axes)
    write_title(axes, "Which settings matter")
    save_figure(figure, path)


def flags(start: Config, best: Config) -> str:
    """Return the flags that turn one configuration into another."""
    before, after = start.flat(), best.flat()
    changed = (_flag_words(name, value) for name, value in after.items() if value != before[name])
    return shlex.join(word for flag in changed for word in flag)


def _flag_words(name: str, value: Any) -> list[str]:
    """Return one flag and its values."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *map(str, values)]
