"""``vitrail sweep``."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from vitrail.cli.console import err, out, print_err, print_out
from vitrail.cli.parsing import parse, parse_known
from vitrail.cli.train import FirstOptions, read_start
from vitrail.config.presets import get_preset
from vitrail.config.settings import Config
from vitrail.errors import ConfigError, TrainingError, import_optional, printable

if TYPE_CHECKING:
    from vitrail.cli.progress import StopRequest
    from vitrail.sweep import Sweep

PROG = "vitrail sweep"
COLUMNS = ("trial", "state", "validation", "epochs", "folder", "error")
"""What describes a trial besides its settings."""
LISTED_TRIALS = 20
"""Number of trials in the table; the CSV file has all."""


@dataclass(frozen=True)
class SearchOptions:
    """What to search and how; all other flags are those of vitrail train, for all trials."""

    search: tuple[str, ...] = ()
    """NAME=A,B,C or NAME=LOW..HIGH, the latter also with :log or :STEP. NAME is a setting of the
    model, the training or the augmentation."""
    trials: int = 20
    """Number of trials of the study, including those of other processes."""
    study_name: str = ""
    """Name of the study and of its folder under output_path; processes with the same name share the
    study. Default: sweep-PRESET."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """How to stop unpromising trials early."""
    storage: str = ""
    """URL of a database for processes on several machines, e.g. postgresql://... Default: SQLite
    in the study's folder."""
    preset: str = "quick"
    """A complete configuration by name (vitrail info lists them)."""
    config: Path | None = None
    """A TOML file of settings, which override the preset's."""
    json: bool = False
    """Print all trials as JSON on standard output."""


@dataclass(frozen=True)
class SweepOptions(Config, SearchOptions):
    """Search for good settings: train many models and rank them by validation accuracy.

    The same command joins the study from another process or machine, and resumes it after a stop.
    The flags of vitrail train below apply to all trials.

    For example:
      vitrail sweep --search learning_rate=1e-4..1e-2:log n_layers=2,4,6 --trials 30
    """


def command(args: Sequence[str]) -> int:
    """Run ``vitrail sweep``."""
    start, _ = parse_known(SearchOptions, args, prog=PROG, add_help=False)
    first, _ = parse_known(FirstOptions, args, prog=PROG, add_help=False)
    base = read_start(dataclasses.replace(first, preset=start.preset))
    defaults = SweepOptions(**vars(start), **vars(base))
    options = parse(SweepOptions, args, prog=PROG, default=defaults)
    name = options.study_name or f"sweep-{options.preset}"
    if name != Path(name).name or name == "..":
        raise ConfigError(f"study_name is {name!r}: give a plain name, no path")
    import_optional("optuna")  # before anything slow
    from vitrail.cli.progress import stop_requests

    settings = Config(**{name: getattr(options, name) for name in vars(base)})
    with stop_requests() as stop:
        sweep = _run(options, settings, settings.run.output_path / name, stop)
    completed = _conclude(sweep, options, settings)
    if stop.signal:
        print_err("interrupted; run the same command to continue")
        return 128 + stop.signal
    if not completed:
        raise TrainingError("no trial completed: the table above gives the reasons")
    return 0


def _run(options: SweepOptions, settings: Config, folder: Path, stop: "StopRequest") -> "Sweep":
    """Run the trials of this process, until all are done or a signal asks to stop."""
    from vitrail.sweep import Stopped, Sweep, describe

    sweep = Sweep(
        settings, folder, search=options.search, trials=options.trials, pruner=options.pruner,
        storage=options.storage, events=lambda run: _shown(run, stop),
    )  # fmt: skip
    waiting = False
    try:
        for trial in sweep.run():
            if trial is not None:
                print_err(summary(describe(trial)))
            elif not waiting:
                print_err("waiting for the trials of other processes")
            waiting = trial is None
            if stop.signal:
                break
    except Stopped:
        pass
    return sweep


def _shown(run: Any, stop: "StopRequest") -> Iterator[Any]:
    """Show a trial's events as vitrail train does, until a signal asks to stop."""
    from vitrail.cli.progress import TrainingDisplay

    print_err(f"{run.folder}")
    with TrainingDisplay(run, err) as display:
        for event in run.train():
            display.show(event)
            yield event
            if stop.signal and not getattr(event, "ends_epoch", False):  # its EpochEnd follows
                return


def _conclude(sweep: "Sweep", options: SweepOptions, settings: Config) -> int:
    """Print the table, write the CSV file and the plot, and print how to use the best settings.

    Returns:
        the number of complete trials.
    """
    from vitrail.sweep import apply, flags, plot_importances, ranked, write_csv

    trials = ranked(sweep.study)
    write_csv(trials, sweep.folder / "trials.csv")
    if options.json:
        print(json.dumps(trials, default=str))
    else:
        out.print(trial_table(trials))
    print_err(f"all trials in {sweep.folder / 'trials.csv'}")
    plot = sweep.folder / "importance.png"
    if shares := plot_importances(sweep.study, plot):
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print_err(f"importance of the settings, in {plot}: {listed}")
    else:
        print_err("no plot of the settings' importance: it needs two complete trials that differ")
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if complete and not options.json:
        values = {name: value for name, value in complete[0].items() if name in sweep.space}
        best = flags(get_preset(options.preset), apply(settings, values))
        print_out(
            f"\nTry next:\n  vitrail train --preset {options.preset} {best}\n"
            f"  vitrail test --model_path {complete[0]['folder']}"
        )
    return len(complete)


def summary(trial: Mapping[str, Any]) -> str:
    """Describe a trial in one line."""
    cells = _cells(trial)
    settings = ", ".join(f"{name} {cells[name]}" for name in cells if name not in COLUMNS)
    return (
        f"trial {cells['trial']} {cells['state']} after {cells['epochs']} epochs, "
        f"validation {cells['validation']}: {settings}"
        + (f": {cells['error']}" if cells["error"] else "")
    )


def trial_table(trials: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the best trials, one per row."""
    settings = dict.fromkeys(name for trial in trials for name in trial if name not in COLUMNS)
    reasons = ["error"] if any(trial["error"] for trial in trials) else []
    columns = [*COLUMNS[:4], *settings, *reasons]
    table = Table(show_edge=False, pad_edge=False)
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in ("state", "error") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for cells in map(_cells, trials[:LISTED_TRIALS]):
        table.add_row(*(Text(printable(cells.get(name, ""))) for name in columns))
    return table


def _cells(trial: Mapping[str, Any]) -> dict[str, str]:
    """Return a trial's values as text, floats with four significant digits."""
    cells = {n: f"{v:.4g}" if isinstance(v, float) else str(v) for n, v in trial.items()}
    accuracy = trial["validation"]
    return cells | {"validation": "–" if accuracy is None else f"{accuracy:.2%}"}
