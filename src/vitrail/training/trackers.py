"""Sends the metrics and attention maps of each epoch to TensorBoard, Weights & Biases and MLflow.

wandb and mlflow are the user's own installations with their own settings and accounts, none of
which is read or stored here. ``trackers.json`` in the run folder holds the id of this run in each
tracker, so that a resumed run continues there.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np

from vitrail.config.settings import Config, RunConfig
from vitrail.data.pictures import read_picture
from vitrail.errors import CheckpointError, OutputError
from vitrail.optional import import_optional
from vitrail.runtime import distributed
from vitrail.runtime.files import write_json

PROJECT = "vitrail"
"""Project (wandb) or experiment (MLflow), unless their own environment variables name another."""

End = Literal["finished", "stopped", "failed"]
"""How training ended: at its last epoch, earlier by request, or by an error."""
Numbers = Mapping[str, float]


class Tracker(Protocol):
    """A destination for the metrics of a run."""

    @property
    def run_id(self) -> str | None:
        """The id of this run in the tracker, if it has one."""

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        """Write the metrics of an epoch, and its attention maps if they were drawn."""

    def close(self, end: End) -> None:
        """Flush, and report how training ended."""


class TensorBoard:
    """Event files in the run folder."""

    run_id = None

    def __init__(self, config: Config, folder: Path, known: str | None) -> None:  # noqa: ARG002
        import_optional("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        """Write the metrics of an epoch."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if picture_HWC is not None:
            self.writer.add_image("attention", picture_HWC, step, dataformats="HWC")
        self.writer.flush()  # so that a full disk is noticed now

    def close(self, end: End) -> None:  # noqa: ARG002 (event files do not record it)
        """Flush the events."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, config: Config, folder: Path, known: str | None) -> None:
        self.wandb = import_optional("wandb")
        self.run_id = known or secrets.token_hex(4)
        remedy = "run wandb login, or set WANDB_MODE=offline"
        with _starting("wandb", self.wandb.errors.Error, remedy):
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=self.run_id,
                resume="allow",
                dir=str(folder),
                config=_parameters(config),
            )

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        """Write the metrics of an epoch."""
        content: dict[str, Any] = dict(numbers)
        if picture_HWC is not None:
            content["attention"] = self.wandb.Image(picture_HWC)
        self.run.log(content, step=step)

    def close(self, end: End) -> None:
        """Report how training ended."""
        self.run.finish(exit_code=0 if end == "finished" else 1)


class Mlflow:
    """A run of MLflow, through its client: the global "active run" is not touched."""

    STATUS: Mapping[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, config: Config, folder: Path, known: str | None) -> None:
        mlflow = import_optional("mlflow")
        remedy = "set MLFLOW_TRACKING_URI, e.g. sqlite:///mlflow.db"
        with _starting("mlflow", mlflow.exceptions.MlflowException, remedy):
            self.client = mlflow.MlflowClient()
            self.run_id = known or self._create_run(config, folder.name)
            self.client.update_run(self.run_id, status="RUNNING")

    def _create_run(self, config: Config, name: str) -> str:
        """Create a run with all settings as its parameters; return its id."""
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        run_id = str(self.client.create_run(number, run_name=name).info.run_id)
        for key, value in _parameters(config).items():
            self.client.log_param(run_id, key, value)
        return run_id

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        """Write the metrics of an epoch."""
        for name, value in numbers.items():
            self.client.log_metric(self.run_id, name, value, step=step)
        if picture_HWC is not None:
            self.client.log_image(self.run_id, picture_HWC, f"attention/step-{step:07}.png")

    def close(self, end: End) -> None:
        """Report how training ended."""
        self.client.set_terminated(self.run_id, status=self.STATUS[end])


KINDS: dict[str, Callable[[Config, Path, str | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}
"""Trackers by the setting that turns them on, which is also the name of the library."""


def check_trackers(config: RunConfig) -> None:
    """Refuse trackers that are not installed, before a run begins.

    Raises:
        ConfigError: tensorboard, wandb or mlflow is requested but not installed.
    """
    for name in KINDS:
        if getattr(config, name):
            import_optional(name)


class Trackers:
    """All trackers of a run; a context manager that closes them.

    A tracker that raises is closed and no longer used: training does not depend on it.

    Args:
        config: the run's settings.
        folder: the run folder.
        problems: one line for each failure is appended to this list.

    Raises:
        ConfigError: a library is not installed.
        CheckpointError: trackers.json is corrupt.
        OutputError: a tracker cannot be started.
    """

    def __init__(self, config: Config, folder: Path, problems: list[str]) -> None:
        self.open: dict[str, Tracker] = {}
        self.problems = problems
        wanted = [name for name in KINDS if getattr(config.run, name) and distributed.is_leader()]
        ids = _read_ids(folder / "trackers.json") if wanted else {}
        try:
            for name in wanted:
                self.open[name] = tracker = KINDS[name](config, folder, ids.get(name))
                if tracker.run_id is not None:
                    ids[name] = tracker.run_id
                    write_json(folder / "trackers.json", ids)
        except BaseException:
            self._close("failed")
            raise

    def write(self, row: Mapping[str, Any], attention: Path | None = None) -> None:
        """Write all numbers of an epoch, and the attention maps if they were drawn."""
        picture_HWC = None if attention is None else read_picture(attention)
        numbers = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        for name in list(self.open):
            if not self._try(name, lambda t: t.write(numbers, picture_HWC, row["step"])):
                self._try(name, lambda t: t.close("failed"))
                del self.open[name]
                self.problems[-1] += f"; nothing was sent to it from step {row['step']} on"

    def _try(self, name: str, action: Callable[[Tracker], None]) -> bool:
        """Do something with a tracker; if it raises, note the problem and return False."""
        try:
            action(self.open[name])
        except Exception as error:  # noqa: BLE001 (whatever the user's library raises)
            lines = str(error).splitlines() or [type(error).__name__]
            self.problems.append(f"{name}: {lines[0].rstrip('.')}")
            return False
        return True

    def _close(self, end: End) -> None:
        """Close all trackers, whichever of them raises."""
        for name in self.open:
            self._try(name, lambda tracker: tracker.close(end))
        self.open = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._close("finished")
        else:  # leaving the loop over Run.train() stops the run: Python closes the generator
            stopped = isinstance(error, GeneratorExit | KeyboardInterrupt)
            self._close("stopped" if stopped else "failed")


def _parameters(config: Config) -> dict[str, Any]:
    """Return the settings as trackers accept them: None and numbers unchanged, others as text."""
    return {
        name: value if isinstance(value, bool | int | float | None) else str(value)
        for name, value in config.flat().items()
    }


@contextmanager
def _starting(name: str, kind: type[Exception], remedy: str) -> Iterator[None]:
    """Convert an exception of a tracker at its start to an OutputError with the remedy."""
    try:
        yield
    except kind as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OutputError(f"{name}: {reason}: {remedy}") from error


def _read_ids(path: Path) -> dict[str, str]:
    """Return the ids of this run, by tracker.

    Raises:
        CheckpointError: trackers.json is corrupt.
    """
    try:
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        ids = error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if isinstance(ids, dict) and all(isinstance(value, str) for value in ids.values()):
        return ids
    raise CheckpointError(
        f"{path}: corrupt, so the ids of this run are lost: remove the file to start new runs there"
    )
