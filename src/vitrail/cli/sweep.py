"""``vitrail sweep``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitrail.cli.console import err, out, say
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
    """What is searched and how; every other flag is one of vitrail train, for all trials."""

    search: tuple[str, ...] = ()
    """NAME=A,B,C or NAME=LOW..HIGH, the latter with :log or :STEP; any setting of the model, the
    training, the augmentation."""
    trials: int = 20
    """Trials of the whole study, those of other processes counted."""
    study_name: str = ""
    """Its folder under output_path, too; sweep-PRESET unless given. Processes that give the same
    name share the study."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """What ends bad trials early."""
    storage: str = ""
    """URL of a database for processes on several machines, e.g. postgresql://...; SQLite in the
    study's folder unless given."""
    preset: str = "quick"
    """A whole configuration by name (vitrail info lists them)."""
    config: Path | None = None
    """A TOML file of settings, over the preset's."""


@dataclass(frozen=True)
class SweepOptions(Config, SearchOptions):
    """Search for good settings: train many models, keep the trials that are good on validation.

    The same command again, here or on another machine, takes part in the same study; one that was
    killed goes on. Any flag of vitrail train below holds for all trials.
    """


def command(words: Sequence[str], *, prog: str = PROG) -> int:
    """Run ``vitrail sweep``."""
    from vitrail.optional import need

    start, _ = parse_known(SearchOptions, words, prog=prog, add_help=False)
    base = get_preset(start.preset)
    if start.config is not None:
        base = read_toml(start.config, base)
    defaults = SweepOptions(**vars(start), **vars(base))
    options = parse(SweepOptions, words, prog=prog, default=defaults)
    settings = Config(**{name: getattr(options, name) for name in vars(base)})
    need("optuna")
    folder = study_folder(options, settings)
    stopped, completed = search(options, settings, folder)
    if stopped:
        say("stopped; the same command resumes the study")
        return 128 + stopped
    if not completed:
        raise TrainingError("no trial completed: the table above gives the reasons")
    return 0


def study_folder(options: SweepOptions, settings: Config) -> Path:
    """Return the folder of the study."""
    name = options.study_name or f"sweep-{options.preset}"
    if name != Path(name).name or name == "..":
        raise ConfigError(f"study_name is {name!r}: give a plain name, no path")
    return settings.run.output_path / name


def search(options: SweepOptions, settings: Config, folder: Path) -> tuple[int, int]:
    """Run this process's trials, then show the study's result.

    Returns:
        the signal that stopped it, or 0; how many trials of the study are complete.
    """
    from vitrail.cli.signals import stop_requests
    from vitrail.sweep.report import Outcome
    from vitrail.sweep.study import Stopped, Sweep, SweepSettings

    how = SweepSettings(options.search, options.trials, options.pruner, options.storage)
    waiting = False
    with stop_requests() as stop:
        sweep = Sweep(settings, how, folder, events=lambda run: shown(run, stop))
        try:
            for trial in sweep.run():
                if trial is not None:
                    say(Outcome.of(trial).line())
                elif not waiting:
                    say("waiting for the last trials of other processes")
                waiting = trial is None
                if stop.signal:
                    break
        except Stopped:
            pass
    return stop.signal, conclude(sweep, options, settings)


def shown(run: Any, stop: "StopRequest") -> Iterator[Any]:
    """Show a trial's events as vitrail train does, until a signal asks to stop."""
    from vitrail.cli.display import TrainingDisplay

    say(f"{run.folder}")
    with TrainingDisplay(run, err) as display:
        for event in run.train():
            display.show(event)
            yield event
            if stop.signal:
                return


def conclude(sweep: "Sweep", options: SweepOptions, settings: Config) -> int:
    """Print the table, write the CSV file and the plot, and say how to use the best settings.

    Returns:
        how many trials are complete.
    """
    from vitrail.sweep import report
    from vitrail.sweep.space import apply

    trials = report.outcomes(sweep.study)
    report.write_csv(trials, sweep.folder / "trials.csv")
    out.print(report.trial_table(trials))
    say(f"all trials in {sweep.folder / 'trials.csv'}")
    shares = report.importances(sweep.study)
    whole = [trial for trial in trials if trial.state == "complete"]
    if shares:
        report.plot_importances(shares, len(whole), sweep.folder / "importance.png")
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        say(f"which settings matter, in {sweep.folder / 'importance.png'}: {told}")
    else:
        say("no plot of which settings matter: it takes two whole trials that differ")
    if whole:
        best = apply(settings, whole[0].params)
        words = report.flags(get_preset(options.preset), best)
        out.print(
            f"\nTry next:\n  vitrail train --preset {options.preset} {words}\n"
            f"  vitrail test --model_path {whole[0].folder}",
            markup=False,
            soft_wrap=True,
        )
    return len(whole)
