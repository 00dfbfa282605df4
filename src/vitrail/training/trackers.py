"""Sends the metrics and attention maps of each epoch to TensorBoard, Weights & Biases and MLflow.

wandb and mlflow are the user's own installations with their own settings and accounts, none of
which is read or stored here. ``trackers.json`` in the run folder holds the id of this run in each
tracker, so that a resumed run continues there.
"""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from vitrail.config.settings import Config, RunConfig
from vitrail.data.pictures import read_picture
from vitrail.errors import CheckpointError, OutputError, first_line, import_optional
from vitrail.runtime import distributed
from vitrail.runtime.files import write_json

PROJECT = "vitrail"
"""Project (wandb) or experiment (MLflow), unless their own environment variables name another."""

End = Literal["finished", "stopped", "failed"]
"""How training ended: at its last epoch, earlier by request, or by an error."""
Numbers = Mapping[str, float]


class _TensorBoard:
    """Event files in the run folder. They do not record how training ended."""

    run_id = None

    def __init__(self, config: Config, folder: Path, known: str | None) -> None:  # noqa: ARG002
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if picture_HWC is not None:
            self.writer.add_image("attention", picture_HWC, step, dataformats="HWC")
        self.writer.flush()  # so that a full disk is noticed now

    def close(self, end: End) -> None:  # noqa: ARG002
        self.writer.close()


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, config: Config, folder: Path, known: str | None) -> None:
        self.wandb = import_optional("wandb")
        self.run_id = known or secrets.token_hex(4)
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=self.run_id,
            resume="allow",
            dir=str(folder),
            config=_parameters(config),
        )

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        content: dict[str, Any] = dict(numbers)
        if picture_HWC is not None:
            content["attention"] = self.wandb.Image(picture_HWC)
        self.run.log(content, step=step)

    def close(self, end: End) -> None:
        self.run.finish(exit_code=0 if end == "finished" else 1)


class _Mlflow:
    """A run of MLflow, through its client: the global "active run" is not touched."""

    STATUS: Mapping[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, config: Config, folder: Path, known: str | None) -> None:
        self.client = import_optional("mlflow").MlflowClient()
        self.run_id = known or self._create_run(config, folder.name)
        self.client.update_run(self.run_id, status="RUNNING")

    def _create_run(self, config: Config, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        run_id = str(self.client.create_run(number, run_name=name).info.run_id)
        for key, value in _parameters(config).items():
            self.client.log_param(run_id, key, value)
        return run_id

    def write(self, numbers: Numbers, picture_HWC: np.ndarray | None, step: int) -> None:
        for name, value in numbers.items():
            self.client.log_metric(self.run_id, name, value, step=step)
        if picture_HWC is not None:
            self.client.log_image(self.run_id, picture_HWC, f"attention/step-{step:07}.png")

    def close(self, end: End) -> None:
        self.client.set_terminated(self.run_id, status=self.STATUS[end])


_Tracker = _TensorBoard | _Wandb | _Mlflow
_KINDS: dict[str, tuple[Callable[[Config, Path, str | None], _Tracker], str]] = {
    "tensorboard": (_TensorBoard, "check that its folder in the run folder can be written"),
    "wandb": (_Wandb, "run wandb login, or set WANDB_MODE=offline"),
    "mlflow": (_Mlflow, "set MLFLOW_TRACKING_URI, e.g. sqlite:///mlflow.db"),
}
"""For each setting that turns a tracker on, which is also the name of its library: the tracker's
class, and what to do if it cannot be started."""


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError if a tracker is requested but not installed."""
    for name in _KINDS:
        if getattr(config, name):
            import_optional(name)


class Trackers:
    """All trackers of a run; a context manager that closes them.

    A tracker that raises is closed and no longer used: training does not depend on it. One line
    for each failure is appended to ``problems``.

    Raises:
        CheckpointError: trackers.json is corrupt.
        OutputError: a tracker cannot be started.
    """

    def __init__(self, config: Config, folder: Path, problems: list[str]) -> None:
        self.open: dict[str, _Tracker] = {}
        self.problems = problems
        wanted = [name for name in _KINDS if getattr(config.run, name) and distributed.is_leader()]
        ids = _read_ids(folder / "trackers.json") if wanted else {}
        for name in wanted:
            kind, remedy = _KINDS[name]
            try:
                self.open[name] = tracker = kind(config, folder, ids.get(name))
            except Exception as error:
                self._close("failed")
                raise OutputError(f"{name}: {first_line(error)}: {remedy}") from error
            if tracker.run_id is not None:
                ids[name] = tracker.run_id
                write_json(folder / "trackers.json", ids)

    def write(self, row: Mapping[str, Any], attention: Path | None = None) -> None:
        """Write all numbers of an epoch, and the attention maps if they were drawn."""
        picture_HWC = None if attention is None else read_picture(attention)
        numbers = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        for name, tracker in list(self.open.items()):
            if not self._try(name, tracker.write, numbers, picture_HWC, row["step"]):
                self._try(name, tracker.close, "failed")
                del self.open[name]
                self.problems[-1] += f"; nothing was sent to it from step {row['step']} on"

    def _try(self, name: str, action: Callable[..., None], *args: Any) -> bool:
        """Run an action of a tracker; if it raises, note the problem and return False."""
        try:
            action(*args)
        except Exception as error:  # noqa: BLE001 (whatever the user's library raises)
            self.problems.append(f"{name}: {first_line(error)}")
            return False
        return True

    def _close(self, end: End) -> None:
        """Close all trackers, even if some of them raise."""
        for name, tracker in self.open.items():
            self._try(name, tracker.close, end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Leaving the loop over Run.train() stops the run: Python closes the generator.
        stopped = isinstance(error, GeneratorExit | KeyboardInterrupt)
        self._close("finished" if error is None else "stopped" if stopped else "failed")


def _parameters(config: Config) -> dict[str, Any]:
    """Return the settings as trackers accept them: None and numbers unchanged, others as text."""
    return {
        name: value if isinstance(value, bool | int | float | None) else str(value)
        for name, value in config.flat().items()
    }


def _read_ids(path: Path) -> dict[str, str]:
    """Return the ids of this run, by tracker."""
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: corrupt: remove it to start new runs in the trackers"
        ) from error
