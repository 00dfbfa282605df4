"""Hyperparameter search: the search space, the trials of a study, and their ranking.

Optuna chooses and prunes the trials; any number of processes and machines may share a study.

OUTPUT/STUDY/
├── study.db                       the study (SQLite), if no other storage is given
├── trials.csv  importance.png     written when a process ends
└── trial-0000/ ...                one run folder per trial
"""

import csv
import io
import json
import math
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch

from vitrail.config.files import convert, from_json
from vitrail.config.settings import Config, RunConfig, require
from vitrail.errors import (
    ConfigError,
    DataError,
    OutputError,
    TrainingError,
    first_line,
    import_optional,
    nearest,
)
from vitrail.evaluation.report import save_figure
from vitrail.runtime.files import replace_file
from vitrail.runtime.rng import derive_seed
from vitrail.training.loop import Update
from vitrail.training.run import EpochEnd, Run
from vitrail.training.run_folder import new_folder

HEARTBEAT_SECONDS = 5
"""Interval of a running trial's heartbeat."""
GRACE_SECONDS = 30
"""A trial without a heartbeat for this long counts as killed, and is repeated."""
RETRIES = 2
"""Maximum number of times that a killed trial is repeated; it may be what kills the process."""
POLL_SECONDS = 1.0
"""Polling interval of a process that waits for others."""
SEARCHED = ("model", "augment", "training")
"""Sections of the settings that can be searched; so can the seed."""
LOCAL = {field.name for field in fields(RunConfig)} - {"seed"} | {"data_path", "num_workers"}
"""Settings that may differ between the processes of a study."""
NO_VALIDATION = (
    "a sweep compares trials on validation images, but there are none: give --validation_images "
    "(or more data), and --monitor validation"
)

Pruning = Literal["median", "hyperband", "none"]
Events = Callable[[Run], Iterator[Update | EpochEnd]]


# --- the search space -----------------------------------------------------------------------------


def parse_space(words: Iterable[str]) -> dict[str, Any]:
    """Parse the arguments of --search: NAME=A,B,C or NAME=LOW..HIGH (:log, :STEP).

    Returns:
        Optuna's distributions, by setting.

    Raises:
        ConfigError: no argument, a name twice, or an invalid argument.
    """
    hints = get_type_hints(Config)
    known = {n: hint for part in SEARCHED for n, hint in get_type_hints(hints[part]).items()}
    known["seed"] = int
    space: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        name = name.replace("-", "_")
        require(bool(text), f"--search {word}: give NAME=A,B,C or NAME=LOW..HIGH[:log]")
        require(name not in space, f"--search has {name} twice: give it once")
        if name not in known:
            raise ConfigError(f"--search {word}: cannot search {name!r}{nearest(name, known)}")
        read = _parse_range if ".." in text else _parse_list
        try:
            space[name] = read(name, text, known[name])
        except (ConfigError, ValueError) as error:  # ours, or Optuna's
            raise ConfigError(f"--search {word}: {error}") from error
    require(bool(space), "nothing to search: give --search, e.g. learning_rate=1e-4..1e-2:log")
    return space


def _parse_list(name: str, text: str, hint: Any) -> Any:
    """Parse A,B,C."""
    values = tuple(_read_choice(name, part, hint) for part in text.split(","))
    require(len(set(values)) > 1, "give at least two different values")
    return import_optional("optuna").distributions.CategoricalDistribution(values)


def _read_choice(name: str, text: str, hint: Any) -> Any:
    """Parse one value; ``none`` is a name that some settings accept, and no value for others."""
    try:
        return convert(name, text, hint)
    except ConfigError:
        return convert(name, _read_value(text), hint)


def _parse_range(name: str, text: str, hint: Any) -> Any:
    """Parse LOW..HIGH, LOW..HIGH:log or LOW..HIGH:STEP."""
    distributions, kinds = import_optional("optuna").distributions, {hint, *get_args(hint)}
    require(bool(kinds & {int, float}), f"{name} is not a number: give a list A,B,C")
    bounds, _, how = text.partition(":")
    low, _, high = bounds.partition("..")
    log, step = how == "log", "" if how == "log" else how
    if float in kinds:
        every = float(step) if step else None
        return distributions.FloatDistribution(float(low), float(high), log=log, step=every)
    return distributions.IntDistribution(int(low), int(high), log=log, step=int(step or 1))


def _read_value(text: str) -> Any:
    """Parse a number, true, false or none; return other text unchanged."""
    try:
        return json.loads({"none": "null", "None": "null"}.get(text, text.lower()))
    except json.JSONDecodeError:
        return text


def suggest(trial: Any, name: str, among: Any) -> Any:
    """Return the value of a setting that Optuna suggests for a trial."""
    if hasattr(among, "choices"):
        return trial.suggest_categorical(name, among.choices)
    number = trial.suggest_int if isinstance(among.low, int) else trial.suggest_float
    return number(name, among.low, among.high, log=among.log, step=among.step)


def apply(base: Config, values: Mapping[str, Any]) -> Config:
    """Return the settings with a trial's values.

    Raises:
        ConfigError: the values are incompatible.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section = next(key for key, part in vars(base).items() if hasattr(part, name))
        sections.setdefault(section, {})[name] = value
    return from_json(sections, base)


# --- the trials -----------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818 (not an error: requested by a signal)
    """A trial's events ended before the trial did."""


class Sweep:
    """One process's part in a study; iterate over ``run()``.

    Args:
        base: the settings common to all trials.
        folder: the study's folder, which has the study's name.
        search: the arguments of --search.
        trials: the number of trials of the study.
        storage: URL of a database that Optuna supports. Default: SQLite in the study's folder.
        events: replaces ``Run.train``, e.g. to show progress. A trial whose events end early is
            queued again.

    Raises:
        ConfigError: Optuna is not installed, or a setting is invalid or differs from the study's.
        OutputError: the storage cannot be used.
    """

    def __init__(
        self,
        base: Config,
        folder: Path,
        *,
        search: Sequence[str],
        trials: int = 20,
        pruner: Pruning = "median",
        storage: str = "",
        events: Events = Run.train,
    ) -> None:
        self.optuna = import_optional("optuna")
        require(trials >= 1, f"trials is {trials}: give at least 1")
        _check(base)
        self.base, self.folder, self.events = base, folder, events
        self.wanted, self.space = trials, parse_space(search)
        self.current = -1
        self.optuna.logging.set_verbosity(self.optuna.logging.ERROR)
        warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)  # heartbeats
        url = storage or _local_storage(folder)
        self.study = _open_study(url, folder.name, self._pruner(pruner))
        self._check_same_settings(search)

    def _pruner(self, name: Pruning) -> Any:
        """Return Optuna's pruner; no trial is pruned before the end of its warm-up."""
        pruners, training = self.optuna.pruners, self.base.training
        patience = math.ceil(training.warmup) + 1
        if name == "median":
            return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=patience)
        if name == "hyperband":
            resource = max(training.epochs, patience + 1)
            return pruners.HyperbandPruner(min_resource=patience, max_resource=resource)
        return pruners.NopPruner()

    def _check_same_settings(self, search: Sequence[str]) -> None:
        """Store the settings in a new study; refuse to join one with different settings."""
        ours = {f"--search {word}": "" for word in sorted(search)}
        ours |= {n: str(value) for n, value in self.base.flat().items() if n not in LOCAL}
        theirs = self.study.user_attrs.get("settings")
        if theirs is None:
            self.study.set_user_attr("settings", ours)
            return
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if names:
            raise ConfigError(
                f"the study {self.folder.name} has different settings: {', '.join(names[:4])}: "
                "give the same settings, or another --study_name"
            )

    def run(self) -> Iterator[Any]:
        """Run trials until the study has the requested number, including other processes' trials.

        Yields:
            an optuna FrozenTrial after each trial of this process; None once per second while
            waiting for the last trials of other processes.

        Raises:
            Stopped: the events of a trial ended early; the trial is queued again.
        """
        state = self.optuna.trial.TrialState
        while True:
            self._fail_killed_trials()
            states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
            done = states.count(state.COMPLETE) + states.count(state.PRUNED)
            if done >= self.wanted:
                return
            if done + states.count(state.RUNNING) >= self.wanted:
                yield None
                time.sleep(POLL_SECONDS)
                continue
            try:
                self.study.optimize(self._objective, n_trials=1)
            except Stopped:
                self.study.enqueue_trial(self.study.trials[self.current].params)
                raise
            yield self.study.trials[self.current]

    def _fail_killed_trials(self) -> None:
        """Fail the trials of killed processes, including any killed before the first heartbeat."""
        self.optuna.storages.fail_stale_trials(self.study)
        state = self.optuna.trial.TrialState
        for trial in self.study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            age = (datetime.now() - trial.datetime_start).total_seconds()
            if not trial.params and age > GRACE_SECONDS:
                self.study.tell(trial.number, state=state.FAIL, skip_if_finished=True)

    def _objective(self, trial: Any) -> float:
        """Run one trial; return its best validation accuracy."""
        self.current = trial.number
        # Processes that share a study draw different trials; a single process is reproducible.
        seed = derive_seed(self.base.run.seed, "sweep", trial.number) % 2**32
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed)
        values = {name: suggest(trial, name, among) for name, among in self.space.items()}
        try:
            return self._train(trial, apply(self.base, values))
        except (ConfigError, TrainingError, torch.OutOfMemoryError) as error:
            # Incompatible values, a loss that is not finite: a bad trial, but a result.
            trial.set_user_attr("error", first_line(error))
            raise self.optuna.TrialPruned from error

    def _train(self, trial: Any, config: Config) -> float:
        """Train with a trial's settings, reporting each epoch to Optuna."""
        folder = new_folder(self.folder, "", f"trial-{trial.number:04}")
        trial.set_user_attr("folder", str(folder))
        run = Run.start(config, folder)
        if "validation" not in run.monitored:  # not a bad trial: all would fail
            raise DataError(NO_VALIDATION)
        for event in self.events(run):
            if isinstance(event, EpochEnd):
                trial.report(event.row["validation_accuracy"], event.row["epoch"])
                if not run.is_complete() and trial.should_prune():
                    raise self.optuna.TrialPruned
        if not run.is_complete():
            raise Stopped
        return max(row["validation_accuracy"] for row in run.rows)


def _check(base: Config) -> None:
    """Refuse invalid settings before anything is written."""
    compared = base.data.validation_images != 0 and base.run.monitor == "validation"
    require(compared, NO_VALIDATION)
    for name in ("folder_name", "model_path", "model_name"):
        given = getattr(base.run, name)
        require(not given, f"a sweep names its trials itself: leave out --{name}")


def _local_storage(folder: Path) -> str:
    """Return the URL of the study's own SQLite file, and create its folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror}") from error
    return f"sqlite:///{(folder / 'study.db').resolve()}"


def _open_study(url: str, name: str, pruner: Any) -> Any:
    """Open or create a study with heartbeats.

    Raises:
        ConfigError: the URL is invalid, or its database driver is not installed.
        OutputError: the database cannot be opened.
    """
    optuna, errors = import_optional("optuna"), import_optional("sqlalchemy.exc")
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
    for attempt in range(5):
        try:
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": 60}} if "sqlite" in url[:6] else {},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=retry,
            )
            return optuna.create_study(
                study_name=name, storage=storage, direction="maximize", pruner=pruner,
                load_if_exists=True,
            )  # fmt: skip
        except errors.DatabaseError as error:
            # Two processes may create the tables simultaneously: the second retries.
            if attempt == 4:
                raise OutputError(f"the study's storage cannot be used: {error.orig}") from error
            time.sleep(0.5 * (attempt + 1))
        except (errors.ArgumentError, ImportError, ValueError) as error:
            raise ConfigError(f"--storage: {error}") from error
    raise AssertionError


# --- the results ----------------------------------------------------------------------------------


def ranked(study: Any) -> list[dict[str, Any]]:
    """Describe all started trials of a study: complete ones first, then by accuracy."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.name != "WAITING"]
    return sorted(
        map(describe, trials),
        key=lambda row: (row["state"] != "complete", -(row["validation"] or 0.0), row["trial"]),
    )


def describe(trial: Any) -> dict[str, Any]:
    """Return the result of an optuna FrozenTrial.

    ``validation`` is the best accuracy so far, None before the end of the first epoch.
    """
    accuracies = trial.intermediate_values
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "validation": max(accuracies.values(), default=None),
        "epochs": max(accuracies, default=0),
        **trial.params,
        "folder": trial.user_attrs.get("folder", ""),
        "error": trial.user_attrs.get("error", ""),
    }


def write_csv(trials: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write all trials, one per row."""
    columns = dict.fromkeys(name for trial in trials for name in trial)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(trials)
    replace_file(path, text.getvalue().encode())


def plot_importances(study: Any, path: Path) -> dict[str, float]:
    """Plot and return the relative importance of each setting; {} if it cannot be computed.

    Source: Watanabe et al. 2023, "PED-ANOVA", arXiv:2304.10255.
    """
    import matplotlib

    optuna = import_optional("optuna")
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len({trial.value for trial in complete}) < 2:
        return {}
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_figure(optuna.visualization.matplotlib.plot_param_importances(study).figure, path)
        return dict(optuna.importance.get_param_importances(study))


def flags(start: Config, best: Config) -> str:
    """Return the flags that turn one configuration into another, with numbers to four digits."""
    words: list[str] = []
    before, default = start.flat(), Config().flat()
    for name, value in best.flat().items():
        if value == before[name]:
            continue
        if isinstance(default[name], bool):  # an optional one, which is None, takes a value
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            shown = (f"{each:.4g}" if isinstance(each, float) else str(each) for each in values)
            words += [f"--{name}", *shown]
    return shlex.join(words)
