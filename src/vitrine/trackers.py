"""An epoch's numbers and pictures to TensorBoard, Weights & Biases and MLflow, if asked for.

wandb and mlflow are the user's own installations with the user's own settings and accounts; nothing
of those is read or kept here. ``trackers.json`` in the run folder says which run of theirs is this
one, so that a run that goes on goes on there too.
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from vitrine import ranks
from vitrine.config import Config, RunConfig
from vitrine.data.pictures import read_picture
from vitrine.errors import OutputError
from vitrine.extras import need
from vitrine.files import write_json
from vitrine.tracking import EventWriter

PROJECT = "vitrine"
"""Name of the project (wandb) or experiment (MLflow), unless their own variables give another."""


def check_trackers(config: RunConfig) -> None:
    """Refuse trackers that are not installed, before a run begins.

    Raises:
        ConfigError: wandb or mlflow is asked for and not installed.
    """
    for name in ("wandb", "mlflow"):
        if getattr(config, name):
            need(name)


class Trackers:
    """All trackers of a run, together; a context that closes them.

    Raises:
        ConfigError: a library is not installed.
        OutputError: a tracker refuses what it is given, or cannot be reached.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.events = EventWriter(folder / "tensorboard", config.run.tensorboard)
        self.others: list[Wandb | Mlflow] = []
        if config.run.wandb and ranks.is_leader():
            self.others.append(Wandb(config, folder))
        if config.run.mlflow and ranks.is_leader():
            self.others.append(Mlflow(config, folder))

    def write(self, row: Mapping[str, Any], attention: Path | None = None) -> None:
        """Write every number of an epoch under its name, and the picture of attention if drawn."""
        picture_HWC = None if attention is None else read_picture(attention)
        numbers = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        self.events.write(row)
        if picture_HWC is not None and self.events.writer is not None:
            self.events.writer.add_image("attention", picture_HWC, row["step"], dataformats="HWC")
        for tracker in self.others:
            tracker.write(numbers, picture_HWC, row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.events.__exit__(kind, error, trace)
        for tracker in self.others:
            tracker.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.wandb = need("wandb")
        identity = recall(folder, "wandb") or secrets.token_hex(4)
        with told_as(
            "wandb", self.wandb.errors.Error, "run wandb login, or set WANDB_MODE=offline"
        ):
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=identity,
                resume="allow",
                dir=str(folder),
                config=plain(config),
            )
        remember(folder, "wandb", identity)

    def write(
        self, numbers: Mapping[str, float], picture_HWC: np.ndarray | None, step: int
    ) -> None:
        """Write an epoch."""
        content: dict[str, Any] = dict(numbers)
        if picture_HWC is not None:
            content["attention"] = self.wandb.Image(picture_HWC)
        with told_as("wandb", self.wandb.errors.Error):
            self.run.log(content, step=step)

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()


class Mlflow:
    """A run of MLflow, by its client: its global "active run" is left alone."""

    def __init__(self, config: Config, folder: Path) -> None:
        mlflow = need("mlflow")
        self.error = mlflow.exceptions.MlflowException
        with told_as("mlflow", self.error, "set MLFLOW_TRACKING_URI, e.g. sqlite:///mlflow.db"):
            self.client = mlflow.MlflowClient()
            self.run_id = recall(folder, "mlflow") or self.begin(config, folder.name)
            self.client.update_run(self.run_id, status="RUNNING")
        remember(folder, "mlflow", self.run_id)

    def begin(self, config: Config, name: str) -> str:
        """Make a run there, with all settings as its parameters; return its id."""
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        run_id = str(self.client.create_run(number, run_name=name).info.run_id)
        for key, value in plain(config).items():
            self.client.log_param(run_id, key, value)
        return run_id

    def write(
        self, numbers: Mapping[str, float], picture_HWC: np.ndarray | None, step: int
    ) -> None:
        """Write an epoch."""
        with told_as("mlflow", self.error):
            for name, value in numbers.items():
                self.client.log_metric(self.run_id, name, value, step=step)
            if picture_HWC is not None:
                self.client.log_image(self.run_id, picture_HWC, f"attention/step-{step:07}.png")

    def close(self) -> None:
        """Mark the run as ended."""
        with told_as("mlflow", self.error):
            self.client.set_terminated(self.run_id)


def plain(config: Config) -> dict[str, Any]:
    """Return the settings as trackers take them; None and numbers as they are, the rest as text."""
    return {
        name: value if isinstance(value, bool | int | float | None) else str(value)
        for name, value in config.flat().items()
    }


@contextmanager
def told_as(name: str, kind: type[Exception], remedy: str = "") -> Iterator[None]:
    """Turn a tracker's own exceptions into ours."""
    try:
        yield
    except kind as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OutputError(f"{name}: {reason}{': ' + remedy if remedy else ''}") from error


def recall(folder: Path, name: str) -> str | None:
    """Return the id that a tracker has for this run, if it has one."""
    path = folder / "trackers.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content.get(name)


def remember(folder: Path, name: str, identity: str) -> None:
    """Note the id that a tracker has for this run."""
    path = folder / "trackers.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**content, name: identity})
