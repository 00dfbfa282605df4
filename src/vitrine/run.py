"""One run: build, train, evaluate, save. It owns the run folder.

output/NAME/
├── config.json  env.json          the settings; the software and hardware
├── metrics.jsonl                  one line an epoch
├── result.json                    the end: validation and test scores, seconds, parameters
├── test_uses.jsonl                each time the test split was opened
├── graph_loss.png  graph_accuracy.png  confusion_matrix.png  calibration.png
├── checkpoints/                   LAST, BEST and their folders: see checkpoint.py
├── attention/                     with --attention_epochs: a picture every so many epochs
├── trackers.json                  with --wandb or --mlflow: which run there is this one
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
from vitrine.config import Config, Split, with_classes
from vitrine.configfile import to_json
from vitrine.data.batches import Batches
from vitrine.data.images import ImageSet
from vitrine.data.sources import load_splits
from vitrine.devices import choose_compile, choose_precision, choose_rank_device
from vitrine.environment import describe_environment
from vitrine.errors import ConfigError
from vitrine.evaluation.figures import plot_curves, plot_metrics
from vitrine.evaluation.metrics import measure, quick_scores, shared_logits
from vitrine.explain.watch import choose_watched, draw_attention
from vitrine.files import write_json, write_json_lines
from vitrine.model import VisionTransformer
from vitrine.predict import Classifier
from vitrine.run_folder import is_best, log_test_use, newest_sound, prune, read_rows
from vitrine.trackers import Trackers, check_trackers
from vitrine.training.loop import Update, train
from vitrine.training.state import TrainingState


@dataclasses.dataclass(frozen=True)
class EpochEnd:
    """What one epoch came to: ``row`` is its line of metrics.jsonl."""

    row: dict[str, Any]
    best: bool


class Run:
    """A training run and its folder. Iterate over train(), then call finish().

    With several processes (see ranks.py) each has a Run and calls the same methods; the first one
    alone reads and writes the folder.

    Example:
        run = Run.start(config, new_folder(Path("output"), "", "quick"))
        for event in run.train():
            ...
        result = run.finish()

    Raises:
        DataError, ConfigError: the data are missing, or do not fit the settings.
    """

    def __init__(self, config: Config, folder: Path, *, fresh: bool = True) -> None:
        check_trackers(config.run)
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.device = choose_rank_device(config.run.device)
        ranks.require_work(config.training.batch_size)
        monitored = dict.fromkeys(("validation", config.run.monitor))
        splits = ranks.first_on_machine(load, config, "train", *monitored)
        train_set = splits.pop("train")
        self.config = config = with_classes(config, train_set.classes)
        self.classes = train_set.classes
        self.monitored = {name: images for name, images in splits.items() if len(images)}
        if config.run.stop_at_accuracy is not None and "validation" not in self.monitored:
            raise ConfigError("stop_at_accuracy looks at validation images: give validation_images")
        self.watched = choose_watched(splits["validation"], config.run.attention_epochs)
        with rng.seeded(config.run.seed, "init", device=self.device):
            model = VisionTransformer(config.model).to(self.device)
        self.notices: list[str] = []
        if fresh and config.training.init:
            self.notices = pretrained.start_from(model, config.training, self.classes)
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
        saved, rows = ranks.on_leader(
            lambda: (newest_sound(folder / "checkpoints"), read_rows(folder))
        )
        run = cls(config, folder, fresh=False)
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
    def compiled(self) -> bool:
        """Whether the model is compiled, as chosen."""
        return choose_compile(self.config.training.compile, self.device, self.total_steps)

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
        if self.rows and self.is_enough(self.rows[-1]):
            return
        with Trackers(self.config, self.folder) as trackers:
            for update in train(self.state, self.batches, self.config):
                # Before the update is told, so that leaving right then loses nothing of the epoch.
                end = self.end_epoch(update) if update.ends_epoch else None
                yield update
                if end is not None:
                    trackers.write(end.row, self.attention_picture(end.row))
                    yield end
                    if self.is_enough(end.row):
                        return

    def is_enough(self, row: dict[str, Any]) -> bool:
        """Tell whether the accuracy to stop at is reached."""
        goal = self.config.run.stop_at_accuracy
        return goal is not None and row["validation_accuracy"] >= goal

    def end_epoch(self, update: Update) -> EpochEnd:
        """Score the epoch, write its line, save and prune checkpoints."""
        began = time.perf_counter()
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
                purpose = f"curve, epoch {update.epoch}"
                ranks.on_leader(log_test_use, self.folder, purpose, len(images))
            logits_BY = self.logits(self.state.best_model, images)
            row[f"{name}_accuracy"], row[f"{name}_loss"] = quick_scores(logits_BY, images.labels_B)
        row["evaluation_seconds"] = round(time.perf_counter() - began, 3)
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
        last = update.step == self.total_steps or self.is_enough(self.rows[-1])
        if best or last or update.epoch % self.config.run.checkpoint_epochs == 0:
            checkpoint = self.write_checkpoint()
            if best:
                write_pointer(self.checkpoints, "BEST", checkpoint)
            if self.config.run.keep_checkpoints:
                prune(self.checkpoints, self.config.run.keep_checkpoints)

    def attention_picture(self, row: dict[str, Any]) -> Path | None:
        """Draw what the model looks at now, if this epoch is one of those that are drawn."""
        every = self.config.run.attention_epochs
        if not every or row["epoch"] % every or not ranks.is_leader():
            return None
        path = self.folder / "attention" / f"epoch-{row['epoch']:04}.png"
        return draw_attention(self.state.best_model, self.watched, self.config, path)

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
        best = ranks.on_leader(  # on the CPU, from where it can go to every process
            lambda: pretrained.load(read_pointer(self.checkpoints, "BEST"), device="cpu")
        )
        test = ranks.first_on_machine(load, self.config, "test")["test"]
        purpose = f"result of {Path(best.source).name}"
        ranks.on_leader(log_test_use, self.folder, purpose, len(test))
        logits_BY = self.logits(best.model.to(self.device), test)
        return ranks.on_leader(self.write_result, best, logits_BY, test.labels_B)

    def write_result(self, best: Classifier, logits_BY: Any, labels_B: Any) -> dict[str, Any]:
        """Write result.json, the pictures and, if asked for, the weights. The leader's work."""
        metrics = measure(logits_BY, labels_B, classes=self.classes)
        result = {**self.summary(best), "test": metrics.to_json()}
        write_json(self.folder / "result.json", result)
        plot_curves(self.rows, self.folder)
        plot_metrics(metrics, self.folder)
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
        epochs = self.rows[-1]["epoch"]
        return {
            "epochs": epochs,
            "best_epoch": row.get("epoch"),
            "validation": validation or None,
            "parameters": sum(parameter.numel() for parameter in best.model.parameters()),
            "train_images": self.train_images,
            "seconds": round(self.state.seconds, 1),
            "evaluation_seconds": round(sum(r.get("evaluation_seconds", 0) for r in self.rows), 1),
            "images_per_second": round(self.train_images * epochs / self.state.seconds, 1),
            "precision": self.precision,
            "compiled": self.compiled,
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
