"""An epoch's numbers and pictures to TensorBoard, Weights & Biases and MLflow, if asked for.

wandb and mlflow are the user's own installations with the user's own settings and accounts; nothing
of those is read or kept here. ``trackers.json`` in the run folder holds the id that each tracker
gave this run, so that a resumed run is continued there, too.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from vitrail.config.settings import Config, RunConfig
from vitrail.data.pictures import read_picture
from vitrail.errors import CheckpointError, OutputError
from vitrail.optional import need
from vitrail.runtime import distributed
from vitrail.runtime.files import write_json

PROJECT = "vitrail"
"""Name of the project (wandb) or experiment (MLflow), unless their own variables give another."""

End = Literal["finished", "stopped", "failed"]
"""How training ended: at its last epoch, earlier by request, or by an error."""
Numbers = Mapping[str, float]


class Tracker(Protocol):
    """Where the numbers of the epochs go."""

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        """Write an epoch."""

    def close(self, end: End) -> None:
        """Send what is left, and how training ended."""


def check_trackers(config: RunConfig) -> None:
    """Refuse trackers that are not installed, before a run begins.

    Raises:
        ConfigError: tensorboard, wandb or mlflow is asked for and not installed.
    """
    for name in ("tensorboard", "wandb", "mlflow"):
        if getattr(config, name):
            need(name)


class Trackers:
    """All trackers of a run, together; a context that closes them.

    A tracker that raises is closed and left out from then on: training does not depend on it.

    Args:
        config: the run's settings.
        folder: the run folder.
        problems: what goes wrong is appended to this list, a line each.

    Raises:
        ConfigError: a library is not installed.
        CheckpointError: trackers.json is damaged.
        OutputError: a tracker cannot be started.
    """

    def __init__(self, config: Config, folder: Path, problems: list[str]) -> None:
        kinds: dict[str, Callable[[Config, Path], Tracker]] = {
            "tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow,
        }  # fmt: skip
        self.open: dict[str, Tracker] = {}
        self.problems = problems
        try:
            for name, kind in kinds.items():
                if getattr(config.run, name) and distributed.is_leader():
                    self.open[name] = kind(config, folder)
        except BaseException:
            self.close("failed")
            raise

    def write(self, row: Mapping[str, Any], attention: Path | None = None) -> None:
        """Write every number of an epoch under its name, and the picture of attention if drawn."""
        picture_HWC = None if attention is None else read_picture(attention)
        numbers = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        for name in list(self.open):
            if not self.succeeds(name, lambda t: t.write(numbers, picture_HWC, row["step"])):
                self.succeeds(name, lambda t: t.close("failed"))
                del self.open[name]
                self.problems[-1] += f"; nothing more is sent to it from step {row['step']} on"

    def succeeds(self, name: str, action: Callable[[Tracker], None]) -> bool:
        """Do something with a tracker; where it raises, note that and return False."""
        try:
            action(self.open[name])
        except Exception as error:  # noqa: BLE001 (whatever a library of the user's raises)
            lines = str(error).splitlines() or [type(error).__name__]
            self.problems.append(f"{name}: {lines[0].rstrip('.')}")
            return False
        return True

    def close(self, end: End) -> None:
        """Close all trackers, whichever of them raises."""
        for name in self.open:
            self.succeeds(name, lambda tracker: tracker.close(end))
        self.open = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close("finished")
        else:  # who leaves the loop over the epochs stops the run: Python closes the generator
            stopped = isinstance(error, GeneratorExit | KeyboardInterrupt)
            self.close("stopped" if stopped else "failed")


class TensorBoard:
    """Events in the run folder."""

    def __init__(self, config: Config, folder: Path) -> None:  # noqa: ARG002 (as the others)
        need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        """Write an epoch."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if picture_HWC is not None:
            self.writer.add_image("attention", picture_HWC, step, dataformats="HWC")
        self.writer.flush()  # so that a full disk is noticed now

    def close(self, end: End) -> None:  # noqa: ARG002 (events know no end)
        """Write what is left."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.wandb = need("wandb")
        identity = known_id(folder, "wandb") or secrets.token_hex(4)
        with starting(
            "wandb", self.wandb.errors.Error, "run wandb login, or set WANDB_MODE=offline"
        ):
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=identity,
                resume="allow",
                dir=str(folder),
                config=as_parameters(config),
            )
        keep_id(folder, "wandb", identity)

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        """Write an epoch."""
        content: dict[str, Any] = dict(numbers)
        if picture_HWC is not None:
            content["attention"] = self.wandb.Image(picture_HWC)
        self.run.log(content, step=step)

    def close(self, end: End) -> None:
        """Send what is left; a run that did not come to its end is marked as failed."""
        self.run.finish(exit_code=0 if end == "finished" else 1)


class Mlflow:
    """A run of MLflow, by its client: its global "active run" is left alone."""

    STATUS: Mapping[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, config: Config, folder: Path) -> None:
        mlflow = need("mlflow")
        remedy = "set MLFLOW_TRACKING_URI, e.g. sqlite:///mlflow.db"
        known = known_id(folder, "mlflow")
        with starting("mlflow", mlflow.exceptions.MlflowException, remedy):
            self.client = mlflow.MlflowClient()
            self.run_id = known or self.begin(config, folder.name)
            self.client.update_run(self.run_id, status="RUNNING")
        keep_id(folder, "mlflow", self.run_id)

    def begin(self, config: Config, name: str) -> str:
        """Make a run there, with all settings as its parameters; return its id."""
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        run_id = str(self.client.create_run(number, run_name=name).info.run_id)
        for key, value in as_parameters(config).items():
            self.client.log_param(run_id, key, value)
        return run_id

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        """Write an epoch."""
        for name, value in numbers.items():
            self.client.log_metric(self.run_id, name, value, step=step)
        if picture_HWC is not None:
            self.client.log_image(self.run_id, picture_HWC, f"attention/step-{step:07}.png")

    def close(self, end: End) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.run_id, status=self.STATUS[end])


def as_parameters(config: Config) -> dict[str, Any]:
    """Return the settings as trackers take them; None and numbers as they are, the rest as text."""
    return {
        name: value if isinstance(value, bool | int | float | None) else str(value)
        for name, value in config.flat().items()
    }


@contextmanager
def starting(name: str, kind: type[Exception], remedy: str) -> Iterator[None]:
    """Turn a tracker's own exception at its start into ours, with the remedy."""
    try:
        yield
    except kind as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OutputError(f"{name}: {reason}: {remedy}") from error


def known_id(folder: Path, name: str) -> str | None:
    """Return the id that a tracker gave this run, if it has one."""
    return read_ids(folder).get(name)


def keep_id(folder: Path, name: str, identity: str) -> None:
    """Keep the id that a tracker gave this run."""
    write_json(folder / "trackers.json", {**read_ids(folder), name: identity})


def read_ids(folder: Path) -> dict[str, str]:
    """Return the ids of this run, by tracker.

    Raises:
        CheckpointError: trackers.json is not what a run wrote.
    """
    path = folder / "trackers.json"
    try:
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        ids = error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if isinstance(ids, dict) and all(isinstance(value, str) for value in ids.values()):
        return ids
    raise CheckpointError(
        f"{path}: damaged, so that it is unknown which run there is this one: remove the file to "
        "start new ones"
    )
