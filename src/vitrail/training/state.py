"""The state of training (model, optimizers, counters), its checkpoints, and recovery after a crash.

A run may be killed between any two writes. ``recover`` then removes what is incomplete, restores
what was moved aside, and makes LAST and BEST name the right checkpoints.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitrail.config.files import RESUME_OVERRIDES
from vitrail.config.settings import Config, TrainingConfig
from vitrail.errors import CheckpointError, OutputError, first_line
from vitrail.model.vit import VisionTransformer
from vitrail.training.optim import freeze_backbone, make_optimizers
from vitrail.weights.checkpoint import (
    CheckpointInfo,
    load_info,
    load_training,
    load_weights,
    read_pointer,
    step_of,
    write_pointer,
)

SLOTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
"""The state that an optimizer keeps for each parameter."""


@dataclass
class Tally:
    """Sums over the images of the current epoch."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0

    def add(self, *, loss: float, correct: int, images: int) -> None:
        """Add one batch with its mean loss."""
        self.loss += loss * images
        self.correct += correct
        self.images += images

    def means(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy."""
        return self.loss / self.images, self.correct / self.images


@dataclass
class TrainingState:
    """The model, its moving average, the optimizers, and the progress.

    ``step`` is the number of updates done, the only loop variable.
    """

    model: VisionTransformer
    optimizers: list[Optimizer]
    average: AveragedModel | None
    step: int = 0
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def start(cls, model: VisionTransformer, config: TrainingConfig) -> "TrainingState":
        """Return the state before the first update."""
        if config.freeze_backbone:
            freeze_backbone(model)
        average = None
        if config.ema_decay:
            update = _warming_average(config.ema_decay)
            average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        return cls(model, make_optimizers(model, config), average)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate and save: the moving average if there is one."""
        return self.model if self.average is None else self.average.module

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, except those of ``eval_model``: see weights()."""
        tensors: dict[str, Tensor] = {}
        if self.average is not None:
            tensors |= {f"model.{name}": t for name, t in self.model.state_dict().items()}
            tensors["average.count"] = self.average.n_averaged
        for number, optimizer in enumerate(self.optimizers):
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{slot}": t for slot, t in slots.items()}
        return tensors

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of ``eval_model``."""
        return dict(self.eval_model.state_dict())

    def numbers(self) -> dict[str, Any]:
        """Return everything that is not a tensor, as JSON values."""
        return {"step": self.step, "seconds": self.seconds, "tally": asdict(self.tally)}

    def restore(
        self,
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
    ) -> None:
        """Restore what weights(), tensors() and numbers() returned.

        Raises:
            CheckpointError: they are for a different model or optimizer.
        """
        try:
            self.eval_model.load_state_dict(weights)
            if self.average is not None:
                self.model.load_state_dict(_under(tensors, "model"))
                self.average.n_averaged.copy_(tensors["average.count"])
            for number, optimizer in enumerate(self.optimizers):
                _restore_optimizer(optimizer, _under(tensors, f"optimizer.{number}"))
            self.step, self.seconds = int(numbers["step"]), float(numbers["seconds"])
            tally = Tally(**numbers["tally"])
            self.tally = Tally(float(tally.loss), int(tally.correct), int(tally.images))
        except Exception as error:
            raise CheckpointError(
                f"the saved training state does not match the settings: {first_line(error):.200}"
            ) from error


def _restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state of every parameter from tensors named ``INDEX.SLOT``."""
    slots: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, slot = name.split(".")
        same = tensor.shape in ((), parameters[int(index)].shape)
        if not (same and tensor.is_floating_point()):
            raise ValueError(f"{slot} is {tensor.dtype} of shape {tuple(tensor.shape)}")
        slots.setdefault(int(index), {})[slot] = tensor
    expected = SLOTS[type(optimizer).__name__]
    complete = len(slots) == len(parameters) and all(set(s) == expected for s in slots.values())
    if slots and not complete:
        raise ValueError(f"{type(optimizer).__name__} lacks some of {sorted(expected)}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _warming_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return an update function for AveragedModel with a decay that warms up to ``decay``.

    The initial weights then do not dominate a short run's average. The first update is a copy.

    Source: TensorFlow's ExponentialMovingAverage, ``num_updates``; timm's ModelEmaV3.
    """

    def update(averages: Any, weights: Any, count: Any) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(now)(averages, weights, count)

    return update


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix.``, without it."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity."""
    floats = ((n, t) for n, t in tensors.items() if t.is_floating_point())
    return next((name for name, tensor in floats if not tensor.isfinite().all()), None)


# --- checkpoints ----------------------------------------------------------------------------------


def quality(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Return a sort key for epochs, highest for the best: by accuracy, then loss, then earliest.

    Without validation the newest epoch is the best. A checkpoint saved within an epoch, of which
    only the step is known, ranks below all epochs.
    """
    if "validation_accuracy" in row:
        return 1, row["validation_accuracy"], -row["validation_loss"], -row["step"]
    return (1 if "epoch" in row else 0), 0, 0, row.get("step", 0)


def checkpoint_folders(checkpoints: Path, last: int | None = None) -> list[Path]:
    """Return the checkpoint folders in order of step: all, or those up to step ``last``."""
    found = [(step_of(path), path) for path in checkpoints.glob("step-*")]
    known = sorted((step, path) for step, path in found if step is not None)
    return [path for step, path in known if last is None or step <= last]


def prune(checkpoints: Path, keep: int) -> None:
    """Remove the checkpoints up to LAST, except BEST and the ``keep`` newest.

    Those after LAST were skipped as corrupt; training will overwrite them.

    Raises:
        OutputError: a checkpoint cannot be removed.
    """
    newest, best = (read_pointer(checkpoints, name) for name in ("LAST", "BEST"))
    folders = checkpoint_folders(checkpoints, last=step_of(newest))
    try:
        for folder in set(folders) - {*folders[-keep:], newest, best}:
            # Renamed first, so that a kill during removal leaves nothing that looks complete.
            doomed = folder.with_name(f".doomed-{folder.name}")
            folder.rename(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise OutputError(f"{checkpoints}: cannot be pruned: {error.strerror}") from error


class SavedState(NamedTuple):
    """A checkpoint in memory, and notices about others that were skipped."""

    folder: Path
    info: CheckpointInfo
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    notices: list[str]
    best: Mapping[str, Any] = {}
    """The row of the checkpoint that BEST names; only its step if it was saved within an epoch."""


def recover(folder: Path, config: Config) -> SavedState | None:
    """Repair a run folder and load its newest valid checkpoint; None if there was none yet.

    Raises:
        CheckpointError: no checkpoint is valid, or the newest has different settings.
        OutputError: the folder cannot be written.
    """
    checkpoints = folder / "checkpoints"
    remove_incomplete(checkpoints)
    if (folder / "config.json").is_file() and not checkpoint_folders(checkpoints):
        return None
    saved = newest_valid(checkpoints)
    _require_same_settings(config, saved)
    write_pointer(checkpoints, "LAST", saved.folder)
    best, row = _best_valid(checkpoints, saved)
    write_pointer(checkpoints, "BEST", best)
    return saved._replace(best=row)


def remove_incomplete(checkpoints: Path) -> None:
    """Remove what a killed run left incomplete; restore what it had moved aside."""
    try:
        for old in checkpoints.glob(".old-*"):
            folder = old.with_name(old.name.removeprefix(".old-"))
            if not folder.exists():
                old.rename(folder)
        for path in checkpoints.glob(".*"):
            if re.match(r"\.(old|partial|doomed)-", path.name):
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{checkpoints}: cannot be written: {error.strerror}") from error


def newest_valid(checkpoints: Path) -> SavedState:
    """Load the newest checkpoint that is complete and unchanged, or raise CheckpointError."""
    skipped: list[str] = []
    for folder in reversed(checkpoint_folders(checkpoints)):
        try:
            state = (load_info(folder), load_weights(folder), load_training(folder))
        except CheckpointError as error:
            skipped.append(f"skipped a corrupt checkpoint: {error}")
        else:
            return SavedState(folder, *state, skipped)
    reason = skipped[0] if skipped else "the run was stopped before its first one"
    raise CheckpointError(f"{checkpoints}: no valid checkpoint to resume from: {reason}")


def _require_same_settings(config: Config, saved: SavedState) -> None:
    """Refuse to resume with settings that differ from the checkpoint's."""
    asked, made = config.flat(), saved.info.config.flat()
    given = {name: value for name, value in asked.items() if (name, value) != ("n_classes", 0)}
    other = [
        f"{name} {value!r} (not {made[name]!r})"
        for name, value in given.items()
        if name not in RESUME_OVERRIDES and value != made[name]
    ]
    if other:
        raise CheckpointError(
            f"{saved.folder}: its settings do not match config.json: {', '.join(other):.200}: "
            "restore config.json, or start a new run"
        )


def _best_valid(checkpoints: Path, saved: SavedState) -> tuple[Path, Mapping[str, Any]]:
    """Return the best valid checkpoint up to the one that is resumed, and its row."""
    rows: dict[Path, Mapping[str, Any]] = {}
    for folder in checkpoint_folders(checkpoints, last=step_of(saved.folder)):
        with contextlib.suppress(CheckpointError):
            metrics, step = load_info(folder).metrics, step_of(folder)
            rows[folder] = metrics if metrics.get("step") == step else {"step": step}
    for folder in sorted(rows, key=lambda folder: quality(rows[folder]), reverse=True):
        try:
            load_weights(folder)
        except CheckpointError as error:
            saved.notices.append(f"skipped a corrupt checkpoint: {error}")
        else:
            return folder, rows[folder]
    raise CheckpointError(f"{checkpoints}: no valid checkpoint")  # the newest was valid just now
