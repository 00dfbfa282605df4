"""One run: build, train, evaluate, save. It owns the run folder.

output/NAME/
├── config.json  env.json          the settings; the software and hardware
├── metrics.jsonl                  one line an epoch
├── result.json                    the end: validation and test scores, seconds, parameters
├── test_uses.jsonl                each time the test split was opened
├── graph_loss.png  graph_accuracy.png  confusion_matrix.png  calibration.png
├── checkpoints/                   LAST, BEST and their folders: see checkpoint.py
└── tensorboard/                   with --tensorboard
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrine import pretrained, rng
from vitrine.checkpoint import (
    CheckpointInfo,
    read_pointer,
    save_checkpoint,
    write_pointer,
)
from vitrine.config import Config, Split
from vitrine.configfile import to_json
from vitrine.data.batches import Batches
from vitrine.data.images import ImageSet
from vitrine.data.sources import load_splits
from vitrine.devices import choose_device, choose_precision
from vitrine.environment import describe_environment
from vitrine.errors import ConfigError, OutputError, TrainingError
from vitrine.evaluation.metrics import measure, predict_logits, quick_scores
from vitrine.files import write_json, write_json_lines
from vitrine.model import VisionTransformer
from vitrine.recovery import hold, recover
from vitrine.results import draw, speed, summarise, write_weights
from vitrine.run_folder import is_best, log_test_use, prune, read_rows
from vitrine.tracking import EventWriter
from vitrine.training.loop import Update, train
from vitrine.training.schedule import multiplier
from vitrine.training.state import TrainingState, first_not_finite

never: Callable[[], bool] = bool
"""Says no."""
SCORED_AT_ONCE = 500
"""Images scored between two looks at whether to stop."""


@dataclasses.dataclass(frozen=True)
class EpochEnd:
    """What one epoch came to: ``row`` is its line of metrics.jsonl."""

    row: dict[str, Any]
    best: bool


class Run:
    """A training run and its folder. Iterate over train(), then call finish().

    Example:
        run = Run.start(config, new_folder(Path("output"), "", "quick"))
        for event in run.train():
            ...
        result = run.finish()

    Raises:
        DataError, ConfigError: the data are missing, or do not fit the settings.
        OutputError: another process is writing to the folder.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.lock = hold(folder)
        self.device = choose_device(config.run.device)
        splits = load(config, "train", *dict.fromkeys(("validation", config.run.monitor)))
        train_set = splits.pop("train")
        self.config = config = with_classes(config, train_set.classes)
        self.classes = train_set.classes
        self.monitored = {name: images for name, images in splits.items() if len(images)}
        with rng.seeded(config.run.seed, "init", device=self.device):
            model = VisionTransformer(config.model).to(self.device)
        self.state = TrainingState.start(model, config.training)
        self.batches = Batches(
            train_set,
            config.augment,
            batch_size=config.training.batch_size,
            seed=config.run.seed,
            device=self.device,
            mean=config.data.mean,
            std=config.data.std,
        )
        self.train_images = len(train_set)
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.saved: Path | None = None
        self.notices: list[str] = []

    @classmethod
    def start(cls, config: Config, folder: Path) -> "Run":
        """Build a new run in a folder of its own (see run_folder.new_folder)."""
        run = cls(config, folder)
        run.write_settings()
        return run

    @classmethod
    def resume(cls, folder: Path, config: Config) -> "Run":
        """Go on from the newest sound checkpoint of a run folder; without any, begin.

        Args:
            folder: the run folder.
            config: the run's settings (its config.json), but for where the data and the device are.

        Raises:
            CheckpointError: the folder has no sound checkpoint, or one made with other settings.
            OutputError: another process is writing to the folder.
        """
        with hold(folder):
            saved, rows = recover(folder, config), read_rows(folder)
            run = cls(config, folder)
        if saved is None:
            run.notices = ["it was stopped before its first checkpoint: beginning again"]
            run.write_settings()
            return run
        run.state.restore(saved.weights, saved.training, saved.info.numbers)
        run.rows = [row for row in rows if row["step"] <= run.state.step]
        run.best, run.saved, run.notices = saved.best, saved.folder, saved.notices
        write_json_lines(folder / "metrics.jsonl", run.rows)
        return run

    @property
    def precision(self) -> str:
        """Number format of the products, as chosen: float32 or bfloat16."""
        dtype = choose_precision(self.config.training.precision, self.device)
        return str(dtype).removeprefix("torch.")

    @property
    def total_steps(self) -> int:
        """Updates in the whole run."""
        return self.config.training.epochs * self.batches.steps_per_epoch

    def train(self, stopping: Callable[[], bool] = never) -> Iterator[Update | EpochEnd]:
        """Train to the end, yielding every update and, after an epoch, what it came to.

        Leave the iteration whenever you like: save() keeps what was done.

        Args:
            stopping: asked now and then while an epoch is scored, which may take long. Once it
                says yes, scoring is put off; leave then after the update, or it begins again.

        Raises:
            TrainingError: the loss, the gradient or a weight is not finite.
            OutputError: the run folder cannot be written.
        """
        try:
            with EventWriter(self.folder / "tensorboard", self.config.run.tensorboard) as writer:
                for event in self.events(stopping):
                    if isinstance(event, EpochEnd):
                        writer.write(event.row)
                    yield event
        except (TrainingError, OutputError) as error:
            kept = f"the last good checkpoint is {self.saved}" if self.saved else "none was saved"
            raise type(error)(f"{error}; {kept}") from error

    def events(self, stopping: Callable[[], bool]) -> Iterator[Update | EpochEnd]:
        """Do what train() says."""
        scored = self.rows[-1]["step"] if self.rows else 0
        ended = self.state.step % self.batches.steps_per_epoch == 0
        if ended and self.state.step > scored and (end := self.end_epoch(stopping)):
            yield end  # of an epoch that was stopped while it was scored
        for update in train(self.state, self.batches, self.config):
            # Before the update is told, so that leaving right then loses nothing of the epoch.
            end = self.end_epoch(stopping) if update.ends_epoch else None
            yield update
            if update.ends_epoch and (end := end or self.end_epoch(never)):
                yield end

    def end_epoch(self, stopping: Callable[[], bool]) -> EpochEnd | None:
        """Score the epoch, write its line, save and prune checkpoints; nothing when stopping."""
        step, per_epoch = self.state.step, self.batches.steps_per_epoch
        training, epoch = self.config.training, step // per_epoch
        loss, accuracy = self.state.tally.means()
        row = {
            "epoch": epoch,
            "step": step,
            "learning_rate": training.learning_rate
            * multiplier(step - 1, training, steps_per_epoch=per_epoch),
            "train_loss": loss,
            "train_accuracy": accuracy,
            "seconds": round(self.state.seconds, 3),
            "images_per_second": speed(self.train_images * epoch, self.state.seconds),
        }
        for name, images in self.monitored.items():
            if name == "test":
                log_test_use(self.folder, f"curve, epoch {epoch}", len(images))
            logits_BY = self.score(images, stopping)
            if logits_BY is None:
                return None
            row[f"{name}_accuracy"], row[f"{name}_loss"] = quick_scores(logits_BY, images.labels_B)
        best = is_best(row, [self.best] if self.best else [])
        self.rows.append(row)
        self.write_epoch(row, best)
        return EpochEnd(row, best)

    def write_epoch(self, row: dict[str, Any], best: bool) -> None:
        """Write an epoch's line; save and prune checkpoints."""
        run, last = self.config.run, row["step"] == self.total_steps
        write_json_lines(self.folder / "metrics.jsonl", self.rows)
        if best or last or row["epoch"] % run.checkpoint_epochs == 0:
            checkpoint = self.save()
            if best:
                write_pointer(self.checkpoints, "BEST", checkpoint)
                self.best = row
            if run.keep_checkpoints:
                prune(self.checkpoints, run.keep_checkpoints)

    def score(self, images: ImageSet, stopping: Callable[[], bool]) -> Tensor | None:
        """Return the logits of a split, or nothing when asked to stop in the middle."""
        parts = []
        for indices_B in torch.arange(len(images)).split(SCORED_AT_ONCE):
            if stopping():
                return None
            parts.append(self.logits(self.state.best_model, images.take(indices_B)))
        return torch.cat(parts)

    def save(self) -> Path:
        """Write a checkpoint of this moment, unless it is there, and let LAST name it.

        Raises:
            TrainingError: a weight is not finite.
            OutputError: the run folder cannot be written.
        """
        folder = self.checkpoints / f"step-{self.state.step:07}"
        if folder == self.saved and folder.is_dir():
            return folder
        weights, training = self.state.weights(), self.state.tensors()
        broken = first_not_finite({**weights, **training})
        if broken is not None:
            raise TrainingError(f"{broken} is not finite after update {self.state.step}: not saved")
        save_checkpoint(folder, self.info(), weights=weights, training=training)
        self.saved = folder
        write_pointer(self.checkpoints, "LAST", folder)
        if not (self.checkpoints / "BEST").exists():
            write_pointer(self.checkpoints, "BEST", folder)
        if not (self.folder / "config.json").exists():  # somebody cleared the folder away
            self.write_settings()
        return folder

    def write_settings(self) -> None:
        """Write what a run is known by: its settings, software and hardware."""
        write_json(self.folder / "config.json", to_json(self.config))
        write_json(self.folder / "env.json", describe_environment(self.device, self.precision))

    def finish(self) -> dict[str, Any]:
        """Test the best model once, write result.json and the pictures, return the result."""
        best = pretrained.load(read_pointer(self.checkpoints, "BEST"), device=self.device.type)
        test = load(self.config, "test")["test"]
        log_test_use(self.folder, f"result of {Path(best.source).name}", len(test))
        metrics = measure(self.logits(best.model, test), test.labels_B, classes=self.classes)
        summary = summarise(
            best, self.config, self.rows, train_images=self.train_images,
            seconds=self.state.seconds, precision=self.precision,
        )  # fmt: skip
        result = {**summary, "test": metrics.to_json()}
        write_json(self.folder / "result.json", result)
        draw(metrics, self.rows, self.folder)
        if self.config.run.model_path is not None:
            write_weights(best, self.info(), self.folder.name)
        return result

    def info(self) -> CheckpointInfo:
        """Return what a checkpoint of this moment says of itself."""
        metrics = self.rows[-1] if self.rows else {}
        return CheckpointInfo(self.config, self.classes, self.state.numbers(), metrics)

    def logits(self, model: Any, images: ImageSet) -> Any:
        """Return the logits of a model for a split (see predict_logits)."""
        data = self.config.data
        return predict_logits(model, images, mean=data.mean, std=data.std, device=self.device)


def load(config: Config, *splits: Split) -> dict[Split, ImageSet]:
    """Load splits as the model reads them."""
    model = config.model
    return load_splits(config.data, splits, image_hw=model.image_hw, n_channels=model.n_channels)


def with_classes(config: Config, classes: tuple[str, ...]) -> Config:
    """Return the settings with as many classes as the data have.

    Raises:
        ConfigError: another number of classes was asked for.
    """
    asked, there = config.model.n_classes, len(classes)
    if asked not in (0, there):
        raise ConfigError(f"n_classes is {asked}, but the data have {there} classes: leave it out")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, n_classes=there))
