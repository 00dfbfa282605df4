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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitrine import pretrained, ranks, rng
from vitrine.checkpoint import (
    CheckpointInfo,
    read_pointer,
    save_checkpoint,
    save_weights_file,
    write_pointer,
)
from vitrine.config import Config, Split
from vitrine.configfile import to_json
from vitrine.data.batches import Batches
from vitrine.data.images import ImageSet
from vitrine.data.sources import load_splits
from vitrine.devices import choose_precision, choose_rank_device
from vitrine.environment import describe_environment
from vitrine.errors import ConfigError
from vitrine.evaluation.figures import plot_calibration, plot_confusion, plot_curves
from vitrine.evaluation.metrics import Metrics, measure, quick_scores, shared_logits
from vitrine.files import write_json, write_json_lines
from vitrine.model import VisionTransformer
from vitrine.predict import Classifier
from vitrine.run_folder import is_best, log_test_use, newest_sound, prune, read_rows
from vitrine.tracking import EventWriter
from vitrine.training.loop import Update, train
from vitrine.training.state import TrainingState


@dataclasses.dataclass(frozen=True)
class EpochEnd:
    """What one epoch came to: ``row`` is its line of metrics.jsonl."""

    row: dict[str, Any]
    best: bool


class Run:
    """A training run and its folder. Iterate over train(), then call finish().

    Of several processes (see ranks.py) each has a Run; the first alone reads and writes the folder.

    Example:
        run = Run.start(config, new_folder(Path("output"), "", "quick"))
        for event in run.train():
            ...
        result = run.finish()

    Raises:
        DataError, ConfigError: the data are missing, or do not fit the settings.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.device = choose_rank_device(config.run.device)
        ranks.require_work(config.training.batch_size)
        splits = load_together(config, "train", *dict.fromkeys(("validation", config.run.monitor)))
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
        self.notices: list[str] = []

    @classmethod
    def start(cls, config: Config, folder: Path) -> "Run":
        """Build a new run in a folder of its own (see run_folder.new_folder)."""
        run = cls(config, folder)
        environment = describe_environment(run.device, run.precision)
        ranks.on_leader(write_json, folder / "config.json", to_json(run.config))
        ranks.on_leader(write_json, folder / "env.json", environment)
        return run

    @classmethod
    def resume(cls, folder: Path, config: Config) -> "Run":
        """Go on from the newest sound checkpoint of a run folder.

        Args:
            folder: the run folder.
            config: the run's settings (its config.json), but for where the data and the device are.

        Raises:
            CheckpointError: the folder has no sound checkpoint.
        """
        saved = ranks.on_leader(newest_sound, folder / "checkpoints")
        rows = ranks.on_leader(read_rows, folder)
        run = cls(config, folder)
        run.state.restore(saved.weights, saved.training, saved.info.numbers)
        run.rows = [row for row in rows if row["step"] <= run.state.step]
        run.notices = saved.passed_over
        ranks.on_leader(write_json_lines, folder / "metrics.jsonl", run.rows)
        ranks.on_leader(write_pointer, run.checkpoints, "LAST", saved.folder)
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

    def train(self) -> Iterator[Update | EpochEnd]:
        """Train to the end, yielding every update and, after an epoch, what it came to.

        Leave the iteration whenever you like: save() keeps what was done.

        Raises:
            TrainingError: the loss is not finite.
            OutputError: the run folder cannot be written.
        """
        self.agree()
        with EventWriter(self.folder / "tensorboard", self.config.run.tensorboard) as events:
            for update in train(self.state, self.batches, self.config):
                # Before the update is told, so that leaving right then loses nothing of the epoch.
                end = self.end_epoch(update) if update.ends_epoch else None
                yield update
                if end is not None:
                    events.write(end.row)
                    yield end

    def end_epoch(self, update: Update) -> EpochEnd:
        """Score the epoch, write its line, save and prune checkpoints."""
        self.agree()
        loss, accuracy = self.state.tally.means()
        row = {
            "epoch": update.epoch,
            "step": update.step,
            "learning_rate": update.learning_rate,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "seconds": round(self.state.seconds, 3),
            "images_per_second": round(self.train_images * update.epoch / self.state.seconds, 1),
        }
        for name, images in self.monitored.items():
            if name == "test":
                self.log_test_use(f"curve, epoch {update.epoch}", images)
            logits_BY = self.logits(self.state.best_model, images)
            row[f"{name}_accuracy"], row[f"{name}_loss"] = quick_scores(logits_BY, images.labels_B)
        best = is_best(row, self.rows)
        self.rows.append(row)
        ranks.on_leader(self.write_epoch, update, best)
        return EpochEnd(row, best)

    def agree(self) -> None:
        """Take over the leader's state: processors of unlike kinds round unlike."""
        ranks.copy_from_leader([*self.state.weights().values(), *self.state.tensors().values()])

    def write_epoch(self, update: Update, best: bool) -> None:
        """Write an epoch's line; save and prune checkpoints. The leader's work."""
        write_json_lines(self.folder / "metrics.jsonl", self.rows)
        last = update.step == self.total_steps
        if best or last or update.epoch % self.config.run.checkpoint_epochs == 0:
            checkpoint = self.write_checkpoint()
            if best:
                write_pointer(self.checkpoints, "BEST", checkpoint)
            if self.config.run.keep_checkpoints:
                prune(self.checkpoints, self.config.run.keep_checkpoints)

    def save(self) -> Path:
        """Write a checkpoint of this moment and let LAST name it."""
        return ranks.on_leader(self.write_checkpoint)

    def write_checkpoint(self) -> Path:
        """Do what save() says. The leader's work."""
        metrics = self.rows[-1] if self.rows else {}
        info = CheckpointInfo(self.config, self.classes, self.state.numbers(), metrics)
        folder = self.checkpoints / f"step-{self.state.step:07}"
        weights, training = self.state.weights(), self.state.tensors()
        save_checkpoint(folder, info, weights=weights, training=training)
        write_pointer(self.checkpoints, "LAST", folder)
        if not (self.checkpoints / "BEST").exists():
            write_pointer(self.checkpoints, "BEST", folder)
        return folder

    def finish(self) -> dict[str, Any]:
        """Test the best model once, write result.json and the pictures, return the result."""
        best = ranks.on_leader(self.load_best)
        test = load_together(self.config, "test")["test"]
        self.log_test_use(f"result of {Path(best.source).name}", test)
        logits_BY = self.logits(best.model.to(self.device), test)
        return ranks.on_leader(self.write_result, best, logits_BY, test.labels_B)

    def log_test_use(self, purpose: str, images: ImageSet) -> None:
        """Write down that the test split is opened."""
        ranks.on_leader(log_test_use, self.folder, purpose, len(images))

    def load_best(self) -> Classifier:
        """Load the best model; on the CPU, from where it can go to every process."""
        return pretrained.load(read_pointer(self.checkpoints, "BEST"), device="cpu")

    def write_result(self, best: Classifier, logits_BY: Any, labels_B: Any) -> dict[str, Any]:
        """Write result.json, the pictures and, if asked for, the weights: the leader's work."""
        metrics = measure(logits_BY, labels_B, classes=self.classes)
        result = {**self.summary(best), "test": metrics.to_json()}
        write_json(self.folder / "result.json", result)
        plot_curves(self.rows, self.folder)
        draw_metrics(metrics, self.folder)
        if self.config.run.model_path is not None:
            self.write_weights(best)
        return result

    def summary(self, best: Classifier) -> dict[str, Any]:
        """Return what result.json says besides the test scores."""
        step = int(Path(best.source).name.removeprefix("step-"))
        row = next((row for row in self.rows if row["step"] == step), {})
        validation = {
            name: row[f"validation_{name}"]
            for name in ("accuracy", "loss")
            if f"validation_{name}" in row
        }
        seen = self.train_images * self.config.training.epochs
        return {
            "epochs": self.config.training.epochs,
            "best_epoch": row.get("epoch"),
            "validation": validation or None,
            "parameters": sum(parameter.numel() for parameter in best.model.parameters()),
            "train_images": self.train_images,
            "seconds": round(self.state.seconds, 1),
            "images_per_second": round(seen / self.state.seconds, 1),
            "precision": self.precision,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def write_weights(self, best: Classifier) -> None:
        """Write the final weights where the reference system's flags want them."""
        run, model = self.config.run, self.config.model
        size = "x".join(map(str, dict.fromkeys(model.image_hw)))
        name = run.model_name or f"vit-layer{model.n_layers}-{size}-{self.config.data.dataset}"
        folder = Path(run.model_path or "model") / self.folder.name
        info = CheckpointInfo(self.config, self.classes, self.state.numbers(), self.rows[-1])
        path = folder / f"{name}-{self.config.training.epochs - 1:03}.safetensors"
        save_weights_file(path, info, best.model.state_dict())

    def logits(self, model: Any, images: ImageSet) -> Any:
        """Return the logits of a model for a split, the work being shared (see shared_logits)."""
        data = self.config.data
        return shared_logits(model, images, mean=data.mean, std=data.std, device=self.device)


def load(config: Config, *splits: Split) -> dict[Split, ImageSet]:
    """Load splits as the model reads them."""
    model = config.model
    return load_splits(config.data, splits, image_hw=model.image_hw, n_channels=model.n_channels)


def load_together(config: Config, *splits: Split) -> dict[Split, ImageSet]:
    """Load splits in every process; where they may be downloaded, one of a machine goes first."""
    downloads = config.data.dataset.startswith("cifar")
    return (ranks.first_on_machine if downloads else ranks.each)(load, config, *splits)


def with_classes(config: Config, classes: tuple[str, ...]) -> Config:
    """Return the settings with as many classes as the data have.

    Raises:
        ConfigError: another number of classes was asked for.
    """
    asked, there = config.model.n_classes, len(classes)
    if asked not in (0, there):
        raise ConfigError(f"n_classes is {asked}, but the data have {there} classes: leave it out")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, n_classes=there))


def draw_metrics(metrics: Metrics, folder: Path) -> None:
    """Draw the confusion matrix and the reliability diagram."""
    plot_confusion(metrics, folder / "confusion_matrix.png")
    plot_calibration(metrics, folder / "calibration.png")
