"""One run: build, train, evaluate, save. It owns the run folder.

output/NAME/
├── config.json  env.json          the settings; the software and hardware
├── manifest.json                  of a folder of pictures: every file, its split, what is left out
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.config.settings import Config, RunConfig, Split, complete_config
from vitrail.data.batches import Batches
from vitrail.data.images import ImageSet, normalize
from vitrail.data.manifest import Manifest
from vitrail.errors import ConfigError, DataError, OutputError, TrainingError
from vitrail.evaluation.metrics import quick_scores, shared_logits
from vitrail.explain.attention_snapshots import choose_watched
from vitrail.model import VisionTransformer
from vitrail.model.layers import ConvStem
from vitrail.runtime import distributed, rng
from vitrail.runtime.devices import choose_rank_device
from vitrail.runtime.files import require_writable, write_json_lines
from vitrail.training.loop import Update, train
from vitrail.training.recovery import hold, recover, require_run_folder
from vitrail.training.results import speed
from vitrail.training.run_data import list_files, load_on_all_ranks, restore_files
from vitrail.training.run_files import RunFiles
from vitrail.training.run_folder import is_best, log_test_use, read_rows, require_unused
from vitrail.training.schedule import multiplier
from vitrail.training.state import TrainingState
from vitrail.training.trackers import Trackers, check_trackers
from vitrail.weights import pretrained
from vitrail.weights.checkpoint import read_pointer

never: Callable[[], bool] = bool
"""Says no."""

WHITENED = 2_000_000
"""Pixels of training images that the white patches of stem conv are fitted to."""

SCORED_AT_ONCE = 500
"""Images scored between two looks at whether to stop."""


@dataclasses.dataclass(frozen=True)
class EpochEnd:
    """What one epoch came to: ``row`` is its line of metrics.jsonl."""

    row: dict[str, Any]
    best: bool


class Run(RunFiles):
    """A training run and its folder. Iterate over train(), then call finish().

    Of several processes (see distributed.py) each has a Run; the first alone uses the folder.

    Example:
        run = Run.start(config, new_folder(Path("output"), "", "quick"))
        for event in run.train():
            ...
        result = run.finish()

    Raises:
        DataError, ConfigError: the data are missing, or do not fit the settings.
        OutputError: another process is writing to the folder.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        fresh: bool = True,
        manifest: Manifest | None = None,
    ) -> None:
        require_ready(config.run)
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.lock = lock(folder)
        self.device = choose_rank_device(config.run.device)
        distributed.require_work(config.training.batch_size)
        if config.run.monitor == "test" and manifest and not manifest.files.get("test"):
            raise ConfigError("monitor is test, but there is no test split: leave --monitor out")
        wanted: list[Split] = ["train", *dict.fromkeys(("validation", config.run.monitor))]
        loaded = load_on_all_ranks(config, manifest, *wanted)
        self.manifest, splits = loaded.manifest, dict(loaded.images)
        train_set = splits.pop("train")
        self.config = config = complete_config(config, train_set.classes, loaded.pixel_range)
        self.classes = train_set.classes
        self.monitored = {name: images for name, images in splits.items() if len(images)}
        if config.run.stop_at_accuracy is not None and "validation" not in self.monitored:
            raise ConfigError("stop_at_accuracy looks at validation images: give validation_images")
        self.watched = choose_watched(splits["validation"], config.run.attention_epochs)
        with rng.seeded(config.run.seed, "init", device=self.device):
            model = VisionTransformer(config.model).to(self.device)
        self.notices: list[str] = []
        self.problems: list[str] = []
        if fresh and config.training.init:
            self.notices = pretrained.start_from(model, config.training, self.classes)
        elif fresh and isinstance(model.stem, ConvStem):
            height, width = config.model.image_hw
            some = train_set.sample(max(1, WHITENED // (height * width)))
            raw_BCHW = some.raw_BCHW.to(self.device)
            model.stem.whiten(normalize(raw_BCHW, config.data.mean, config.data.std))
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

    @classmethod
    def start(cls, config: Config, folder: Path, manifest: Manifest | None = None) -> "Run":
        """Build a new run in a folder of its own (see run_folder.new_folder).

        Args:
            config: the run's settings.
            folder: the run folder.
            manifest: the files of a data set that is a folder, if they were listed already.

        Raises:
            ConfigError: there is something in the folder already.
        """
        distributed.on_leader(require_unused, folder)
        if config.data.dataset != "shapes":  # so that the run is tested from any folder
            place = config.data.data_path.absolute()
            config = dataclasses.replace(
                config, data=dataclasses.replace(config.data, data_path=place)
            )
        run = cls(config, folder, manifest=distributed.on_leader(list_files, config, manifest))
        distributed.on_leader(run.write_settings)
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
        distributed.on_leader(require_run_folder, folder)  # before the lock, which makes the folder
        held = lock(folder)  # until the run holds it itself
        saved, rows = distributed.on_leader(lambda: (recover(folder, config), read_rows(folder)))
        manifest, added = distributed.on_leader(restore_files, config, folder)
        run = cls(config, folder, fresh=saved is None, manifest=manifest)
        if run.manifest != manifest:
            raise DataError(f"{config.data.data_path}: some pictures cannot be decoded any more")
        if added:
            run.notices.append(f"{added:,} pictures were added since the run began: not used")
        del held
        if saved is None:
            run.notices.append("it was stopped before its first checkpoint: beginning again")
            distributed.on_leader(run.write_settings)
            return run
        run.state.restore(saved.weights, saved.training, saved.info.numbers)
        run.rows = [row for row in rows if row["step"] <= run.state.step]
        run.best, run.saved = saved.best, saved.folder
        run.notices += saved.notices
        distributed.on_leader(write_json_lines, folder / "metrics.jsonl", run.rows)
        return run

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
        self.agree()
        try:
            with Trackers(self.config, self.folder, self.problems) as trackers:
                for event in self.events(stopping):
                    if isinstance(event, EpochEnd):
                        trackers.write(event.row, self.attention_picture(event.row))
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
        if self.is_enough():
            return
        for update in train(self.state, self.batches, self.config):
            # Before the update is told, so that leaving right then loses nothing of the epoch.
            end = self.end_epoch(stopping) if update.ends_epoch else None
            yield update
            if update.ends_epoch and (end := end or self.end_epoch(never)):
                yield end
                if self.is_enough():
                    return

    def end_epoch(self, stopping: Callable[[], bool]) -> EpochEnd | None:
        """Score the epoch, write its line, save and prune checkpoints; nothing when stopping."""
        began = time.perf_counter()
        self.agree()
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
                purpose = f"curve, epoch {epoch}"
                distributed.on_leader(log_test_use, self.folder, purpose, len(images))
            logits_BY = self.score(images, stopping)
            if logits_BY is None:
                return None
            row[f"{name}_accuracy"], row[f"{name}_loss"] = quick_scores(logits_BY, images.labels_B)
        row["evaluation_seconds"] = round(time.perf_counter() - began, 3)
        best = is_best(row, [self.best] if self.best else [])
        self.rows.append(row)
        self.saved = distributed.on_leader(self.write_epoch, row, best)
        self.best = row if best else self.best
        return EpochEnd(row, best)

    def agree(self) -> None:
        """Take over the leader's state: processors of unlike kinds round unlike."""
        distributed.copy_from_leader(
            [*self.state.weights().values(), *self.state.tensors().values()]
        )

    def score(self, images: ImageSet, stopping: Callable[[], bool]) -> Tensor | None:
        """Return the logits of a split, or nothing when asked to stop in the middle."""
        parts = []
        for indices_B in torch.arange(len(images)).split(SCORED_AT_ONCE):
            if distributed.highest(int(stopping())):
                return None
            parts.append(self.logits(self.state.best_model, images.take(indices_B)))
        return torch.cat(parts)

    def save(self) -> Path:
        """Write a checkpoint of this moment, unless it is there, and let LAST name it.

        Raises:
            TrainingError: a weight is not finite.
            OutputError: the run folder cannot be written.
        """
        self.saved = distributed.on_leader(self.write_checkpoint)
        return self.saved

    def finish(self) -> dict[str, Any]:
        """Test the best model once, write result.json and the pictures, return the result.

        What could not be drawn is in ``problems`` afterward.
        """
        best = distributed.on_leader(  # on the CPU, from where it can go to every process
            lambda: pretrained.load(read_pointer(self.checkpoints, "BEST"), device="cpu")
        )
        if self.manifest is not None and not self.manifest.files.get("test"):
            return distributed.on_leader(self.write_result, best, None, None)
        test = load_on_all_ranks(self.config, self.manifest, "test").images["test"]
        purpose = f"result of {Path(best.source).name}"
        distributed.on_leader(log_test_use, self.folder, purpose, len(test))
        logits_BY = self.logits(best.model.to(self.device), test)
        return distributed.on_leader(self.write_result, best, logits_BY, test.labels_B)

    def logits(self, model: Any, images: ImageSet) -> Any:
        """Return the logits of a model for a split, the work being shared (see shared_logits)."""
        data = self.config.data
        return shared_logits(model, images, mean=data.mean, std=data.std, device=self.device)


def require_ready(run: RunConfig) -> None:
    """Refuse what would only fail later: trackers that are missing, a place for the weights.

    Raises:
        ConfigError: a tracker is not installed.
        OutputError: the weights could not be written.
    """
    check_trackers(run)
    if run.model_path is not None:
        distributed.on_leader(require_writable, run.model_path)


def lock(folder: Path) -> AbstractContextManager[object] | None:
    """Keep other processes from writing the folder, on behalf of all ranks (see hold)."""
    return distributed.each(lambda: hold(folder) if distributed.is_leader() else None)
