"""``vitrail sweep``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitrail.cli.console import err, out, print_err, print_out
from vitrail.cli.parsing import parse, parse_known
from vitrail.config.files import read_toml
from vitrail.config.presets import get_preset
from vitrail.config.settings import Config
from vitrail.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from vitrail.cli.signals import StopRequest
    from vitrail.sweep.study import Sweep

PROG = "vitrail sweep"


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


@dataclass(frozen=True)
class SweepOptions(Config, SearchOptions):
    """Search for good settings: train many models and rank them by validation accuracy.

    The same command joins the study from another process or machine, and resumes it after a stop.
    The flags of vitrail train below apply to all trials.

    For example: vitrail sweep --search learning_rate=1e-4..1e-2:log n_layers=2,4,6 --trials 30
    """


def command(args: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail sweep``."""
    from vitrail.optional import import_optional

    start, _ = parse_known(SearchOptions, args, prog=prog, add_help=False)
    base = get_preset(start.preset)
    if start.config is not None:
        base = read_toml(start.config, base)
    defaults = SweepOptions(**vars(start), **vars(base))
    options = parse(SweepOptions, args, prog=prog, default=defaults)
    settings = Config(**{name: getattr(options, name) for name in vars(base)})
    import_optional("optuna")
    folder = _study_folder(options, settings)
    stopped, completed = _search(options, settings, folder)
    if stopped:
        print_err("interrupted; run the same command to continue")
        return 128 + stopped
    if not completed:
        raise TrainingError("no trial completed: the table above gives the reasons")
    return 0


def _study_folder(options: SweepOptions, settings: Config) -> Path:
    """Return the folder of the study."""
    name = options.study_name or f"sweep-{options.preset}"
    if name != Path(name).name or name == "..":
        raise ConfigError(f"study_name is {name!r}: give a plain name, no path")
    return settings.run.output_path / name


def _search(options: SweepOptions, settings: Config, folder: Path) -> tuple[int, int]:
    """Run the trials of this process, then show the result of the study.

    Returns:
        the signal that stopped it, or 0; the number of complete trials of the study.
    """
    from vitrail.cli.signals import stop_requests
    from vitrail.sweep.report import Outcome
    from vitrail.sweep.study import Stopped, Sweep, SweepSettings

    how = SweepSettings(options.search, options.trials, options.pruner, options.storage)
    waiting = False
    with stop_requests() as stop:
        sweep = Sweep(settings, how, folder, events=lambda run: _shown(run, stop))
        try:
            for trial in sweep.run():
                if trial is not None:
                    print_err(Outcome.of(trial).line())
                elif not waiting:
                    print_err("waiting for the trials of other processes")
                waiting = trial is None
                if stop.signal:
                    break
        except Stopped:
            pass
    return stop.signal, _conclude(sweep, options, settings)


def _shown(run: Any, stop: "StopRequest") -> Iterator[Any]:
    """Show a trial's events as vitrail train does, until a signal asks to stop."""
    from vitrail.cli.display import TrainingDisplay

    print_err(f"{run.folder}")
    with TrainingDisplay(run, err) as display:
        for event in run.train():
            display.show(event)
            yield event
            if stop.signal:
                return


def _conclude(sweep: "Sweep", options: SweepOptions, settings: Config) -> int:
    """Print the table, write the CSV file and the plot, and print how to use the best settings.

    Returns:
        the number of complete trials.
    """
    from vitrail.sweep import report
    from vitrail.sweep.space import apply

    trials = report.outcomes(sweep.study)
    report.write_csv(trials, sweep.folder / "trials.csv")
    out.print(report.trial_table(trials))
    print_err(f"all trials in {sweep.folder / 'trials.csv'}")
    shares = report.importances(sweep.study)
    complete = [trial for trial in trials if trial.state == "complete"]
    if shares:
        report.plot_importances(shares, len(complete), sweep.folder / "importance.png")
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        print_err(f"importance of the settings, in {sweep.folder / 'importance.png'}: {listed}")
    else:
        print_err("no plot of the settings' importance: it takes two complete trials that differ")
    if complete:
        best = apply(settings, complete[0].params)
        flags = report.flags(get_preset(options.preset), best)
        print_out(
            f"\nTry next:\n  vitrail train --preset {options.preset} {flags}\n"
            f"  vitrail test --model_path {complete[0].folder}"
        )
    return len(complete)
