"""Runs the trials of a study, which any number of processes and machines may share.

OUTPUT/STUDY/
├── study.db                       the study (SQLite), if no other storage is given
├── trials.csv  importance.png     written when a process ends
└── trial-0000/ ...                one run folder per trial
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from vitrail.config.settings import Config, require
from vitrail.errors import ConfigError, DataError, OutputError, TrainingError
from vitrail.optional import import_optional
from vitrail.runtime.rng import derive_seed
from vitrail.sweep.space import Value, apply, parse_space, signature
from vitrail.training.loop import Update
from vitrail.training.run import EpochEnd, Run
from vitrail.training.run_folder import new_folder

HEARTBEAT_SECONDS = 5
"""Interval of a running trial's heartbeat."""
GRACE_SECONDS = 30
"""A trial without a heartbeat for this long counts as killed, and is repeated."""
RETRIES = 2
"""Maximum number of times that a killed trial is repeated; it may be the cause itself."""
POLL_SECONDS = 1.0
"""Polling interval of a process that waits for others."""

NO_VALIDATION = (
    "a sweep compares trials on validation images, but these training images are too few to hold "
    "any out: give --validation_images, or more data"
)

Pruning = Literal["median", "hyperband", "none"]
Events = Callable[[Run], Iterator[Update | EpochEnd]]


@dataclass(frozen=True)
class SweepSettings:
    """Settings of a search."""

    search: tuple[str, ...]
    trials: int = 20
    pruner: Pruning = "median"
    storage: str = ""
    """URL of a database that Optuna supports. Default: SQLite in the study's folder."""


class Stopped(Exception):  # noqa: N818 (not an error: requested by a signal)
    """A trial's events ended before the trial did."""


class Sweep:
    """One process's part in a study; iterate over ``run()``.

    Args:
        base: the settings common to all trials.
        settings: the settings of the search.
        folder: the study's folder; its name is the study's.
        events: replaces ``Run.train``, e.g. to show progress. A trial whose events end early is put
            back into the study.

    Raises:
        ConfigError: Optuna is not installed, a setting is invalid, or the study has others.
        OutputError: the storage cannot be used.
    """

    def __init__(
        self, base: Config, settings: SweepSettings, folder: Path, *, events: Events = Run.train
    ) -> None:
        self.optuna = import_optional("optuna")
        _check(base, settings)
        self.base, self.folder, self.events = base, folder, events
        self.wanted, self.space = settings.trials, parse_space(settings.search)
        self.current = -1
        self.optuna.logging.set_verbosity(self.optuna.logging.ERROR)
        with _quiet(self.optuna):
            self.study = _open_study(
                settings.storage or _local_storage(folder),
                folder.name,
                self._pruner(settings.pruner),
            )
        self._seed_sampler(len(self.study.trials))
        self._check_same_settings(signature(base, settings.search))

    def _seed_sampler(self, number: int) -> None:
        """Set a sampler seeded with the run's seed and a trial's number.

        Processes that share a study draw different trials; a single process is reproducible.
        """
        seed = derive_seed(self.base.run.seed, "sweep", number) % 2**32
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed)

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

    def _check_same_settings(self, ours: dict[str, str]) -> None:
        """Store the settings in a new study; refuse to join one that has others."""
        theirs = self.study.user_attrs.get("settings")
        if theirs is None:
            self.study.set_user_attr("settings", ours)
            return
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if names:
            raise ConfigError(
                f"the study {self.folder.name} has other settings: {', '.join(names[:4])}: "
                "give the same settings, or another --study_name"
            )

    def run(self) -> Iterator[Any]:
        """Run trials until the study has the requested number, including other processes' trials.

        Yields:
            an optuna FrozenTrial after each trial of this process; None once per second while
            waiting for the last trials of other processes.

        Raises:
            Stopped: the events of a trial ended early; the trial is back in the study.
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
                with _quiet(self.optuna):
                    self.study.optimize(self._objective, n_trials=1)
            except Stopped:
                self.study.enqueue_trial(self.study.trials[self.current].params)
                raise
            yield self.study.trials[self.current]

    def _fail_killed_trials(self) -> None:
        """Fail the trials of killed processes, so that others repeat them.

        Optuna finds those whose heartbeat stopped. A trial that was killed before its first
        heartbeat is recognized by its age; it has no settings yet.
        """
        with _quiet(self.optuna):
            self.optuna.storages.fail_stale_trials(self.study)
        state, now = self.optuna.trial.TrialState, datetime.now()
        for trial in self.study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            age = (now - (trial.datetime_start or now)).total_seconds()
            if not trial.params and age > GRACE_SECONDS:
                self.study.tell(trial.number, state=state.FAIL, skip_if_finished=True)

    def _objective(self, trial: Any) -> float:
        """Run one trial; return its best validation accuracy."""
        self.current = trial.number
        self._seed_sampler(trial.number)
        values: dict[str, Value] = {each.name: each.suggest(trial) for each in self.space}
        try:
            return self._train(trial, apply(self.base, values))
        except (ConfigError, TrainingError, torch.OutOfMemoryError) as error:
            # Incompatible values, a loss that is not finite: a bad trial, but a result.
            trial.set_user_attr("error", str(error).splitlines()[0])
            raise self.optuna.TrialPruned from error

    def _train(self, trial: Any, config: Config) -> float:
        """Train with a trial's settings, reporting each epoch to Optuna."""
        folder = new_folder(self.folder, "", f"trial-{trial.number:04}")
        trial.set_user_attr("folder", str(folder))
        run, best = Run.start(config, folder), 0.0
        if "validation" not in run.monitored:  # not a bad trial: all would fail
            raise DataError(NO_VALIDATION)
        for event in self.events(run):
            if isinstance(event, EpochEnd):
                accuracy = event.row["validation_accuracy"]
                best = max(best, accuracy)
                trial.report(accuracy, event.row["epoch"])
                last = run.state.step == run.total_steps
                if not last and trial.should_prune():
                    raise self.optuna.TrialPruned
        if run.state.step < run.total_steps:
            raise Stopped
        return best


def _check(base: Config, settings: SweepSettings) -> None:
    """Refuse invalid settings before anything is written."""
    require(settings.trials >= 1, f"trials is {settings.trials}: give at least 1")
    require(
        base.data.validation_images != 0,
        "a sweep compares trials on validation images, but validation_images is 0: give more",
    )
    train, kept = base.data.num_train_images, base.data.validation_images
    require(kept is not None or train is None or train >= 10, NO_VALIDATION)
    require(
        base.run.monitor == "validation",
        "a sweep compares trials on validation images: give --monitor validation",
    )
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
        except (errors.OperationalError, errors.DatabaseError) as error:
            # Two processes may create the tables simultaneously: the second retries.
            if attempt == 4:
                raise OutputError(f"the study's storage cannot be used: {error.orig}") from error
            time.sleep(0.5 * (attempt + 1))
        except (errors.ArgumentError, ImportError, ValueError) as error:
            raise ConfigError(f"--storage: {error}") from error
    raise AssertionError


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Suppress Optuna's warning that heartbeats are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
