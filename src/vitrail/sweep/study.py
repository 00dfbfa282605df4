"""The trials of a study. Any number of processes and machines may share one.

OUTPUT/STUDY/
├── study.db                       the study (SQLite), unless another storage is given
├── trials.csv  importance.png     written when a process ends
└── trial-0000/ ...                a run folder each
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
"""A running trial signs on so often."""
GRACE_SECONDS = 30
"""A trial without a heartbeat for this long was killed: another process repeats it."""
RETRIES = 2
"""How often a trial that was killed is taken up again; it may be the reason itself."""
POLL_SECONDS = 1.0
"""How often a process that waits for others looks."""

NO_VALIDATION = (
    "a sweep chooses on validation images, and a tenth of these training images is none: give "
    "--validation_images, or more data"
)

Pruning = Literal["median", "hyperband", "none"]
Events = Callable[[Run], Iterator[Update | EpochEnd]]


@dataclass(frozen=True)
class SweepSettings:
    """How to search."""

    search: tuple[str, ...]
    trials: int = 20
    pruner: Pruning = "median"
    storage: str = ""
    """URL of a database that Optuna knows; Default: SQLite in the study's folder."""


class Stopped(Exception):  # noqa: N818 (no error: a signal asked for it)
    """The events of a trial ended before the trial did."""


class Sweep:
    """One process's part in a study; iterate over run().

    Args:
        base: the settings that all trials share.
        settings: how to search.
        folder: the study's folder; its name is the study's.
        events: what to iterate over instead of ``Run.train``, e.g. to show it. A trial whose
            events end early is put back into the study.

    Raises:
        ConfigError: Optuna is not installed, a setting cannot be, or the study is another one's.
        OutputError: the storage cannot be used.
    """

    def __init__(
        self, base: Config, settings: SweepSettings, folder: Path, *, events: Events = Run.train
    ) -> None:
        self.optuna = import_optional("optuna")
        check(base, settings)
        self.base, self.folder, self.events = base, folder, events
        self.wanted, self.space = settings.trials, parse_space(settings.search)
        self.current = -1
        self.optuna.logging.set_verbosity(self.optuna.logging.ERROR)
        with quiet(self.optuna):
            self.study = open_study(
                settings.storage or local_storage(folder), folder.name, self.pruner(settings.pruner)
            )
        self.seed_sampler(len(self.study.trials))
        self.agree(signature(base, settings.search))

    def seed_sampler(self, number: int) -> None:
        """Give the study a sampler that draws by the seed and the number of a trial.

        Processes that share a study so draw different trials, and one alone draws the same again.
        """
        seed = derive_seed(self.base.run.seed, "sweep", number) % 2**32
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed)

    def pruner(self, name: Pruning) -> Any:
        """Return what cuts bad trials short; none is cut before its warm-up is over."""
        pruners, training = self.optuna.pruners, self.base.training
        patience = math.ceil(training.warmup) + 1
        if name == "median":
            return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=patience)
        if name == "hyperband":
            resource = max(training.epochs, patience + 1)
            return pruners.HyperbandPruner(min_resource=patience, max_resource=resource)
        return pruners.NopPruner()

    def agree(self, ours: dict[str, str]) -> None:
        """Write into a new study what it is about; refuse to join one that is about else."""
        theirs = self.study.user_attrs.get("settings")
        if theirs is None:
            self.study.set_user_attr("settings", ours)
            return
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if names:
            raise ConfigError(
                f"the study {self.folder.name} is about other settings: {', '.join(names[:4])}: "
                "give the same, or another --study_name"
            )

    def run(self) -> Iterator[Any]:
        """Run trials until the study has as many as wanted, those of other processes counted.

        Yields:
            an optuna FrozenTrial after each trial of this process; None for every second of
            waiting for the last trials of other processes.

        Raises:
            Stopped: the events of a trial ended early; the trial is back in the study.
        """
        state = self.optuna.trial.TrialState
        while True:
            self.bury()
            states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
            done = states.count(state.COMPLETE) + states.count(state.PRUNED)
            if done >= self.wanted:
                return
            if done + states.count(state.RUNNING) >= self.wanted:
                yield None
                time.sleep(POLL_SECONDS)
                continue
            try:
                with quiet(self.optuna):
                    self.study.optimize(self.objective, n_trials=1)
            except Stopped:
                self.study.enqueue_trial(self.study.trials[self.current].params)
                raise
            yield self.study.trials[self.current]

    def bury(self) -> None:
        """Fail the trials of processes that were killed, so that others take them up again.

        Optuna finds those whose signs of life have ended. A trial that was killed before its first
        sign has none that could end; it has drawn no settings either.
        """
        with quiet(self.optuna):
            self.optuna.storages.fail_stale_trials(self.study)
        state, now = self.optuna.trial.TrialState, datetime.now()
        for trial in self.study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            age = (now - (trial.datetime_start or now)).total_seconds()
            if not trial.params and age > GRACE_SECONDS:
                self.study.tell(trial.number, state=state.FAIL, skip_if_finished=True)

    def objective(self, trial: Any) -> float:
        """Run one trial; return its best validation accuracy."""
        self.current = trial.number
        self.seed_sampler(trial.number)
        values: dict[str, Value] = {each.name: each.suggest(trial) for each in self.space}
        try:
            return self.follow(trial, apply(self.base, values))
        except (ConfigError, TrainingError, torch.OutOfMemoryError) as error:
            # Values that do not go together, a loss that is not finite: bad, but a result.
            trial.set_user_attr("error", str(error).splitlines()[0])
            raise self.optuna.TrialPruned from error

    def follow(self, trial: Any, config: Config) -> float:
        """Train with a trial's settings, telling Optuna how it goes."""
        folder = new_folder(self.folder, "", f"trial-{trial.number:04}")
        trial.set_user_attr("folder", str(folder))
        run, best = Run.start(config, folder), 0.0
        if "validation" not in run.monitored:  # no bad trial: all of them would be like this
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


def check(base: Config, settings: SweepSettings) -> None:
    """Refuse what cannot be searched, before anything is made."""
    require(settings.trials >= 1, f"trials is {settings.trials}: give at least 1")
    require(
        base.data.validation_images != 0,
        "a sweep chooses on validation images, and validation_images is 0: give more",
    )
    train, kept = base.data.num_train_images, base.data.validation_images
    require(kept is not None or train is None or train >= 10, NO_VALIDATION)
    require(
        base.run.monitor == "validation",
        "a sweep chooses on validation images: give --monitor validation",
    )
    for name in ("folder_name", "model_path", "model_name"):
        given = getattr(base.run, name)
        require(not given, f"a sweep names its trials itself: leave out --{name}")


def local_storage(folder: Path) -> str:
    """Return the URL of the study's own SQLite file, and make its folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}") from error
    return f"sqlite:///{(folder / 'study.db').resolve()}"


def open_study(url: str, name: str, pruner: Any) -> Any:
    """Open or make a study that signs on while its trials run.

    Raises:
        ConfigError: the URL is of no database that can be used here.
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
            # Two processes that make the tables at the same moment: the second finds them there.
            if attempt == 4:
                raise OutputError(f"the study's storage cannot be used: {error.orig}") from error
            time.sleep(0.5 * (attempt + 1))
        except (errors.ArgumentError, ImportError, ValueError) as error:
            raise ConfigError(f"--storage: {error}") from error
    raise AssertionError


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Keep to itself that Optuna calls its heartbeats experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
