"""One training run: build, train, evaluate, save. Its files are described in run_folder.py."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.config.files import to_json
from vitrail.config.settings import Config, Split
from vitrail.data.batches import Batches
from vitrail.data.images import ImageSet, normalize
from vitrail.data.manifest import Manifest
from vitrail.errors import CheckpointError, ConfigError, DataError, OutputError, TrainingError
from vitrail.evaluation.calibration import UNCALIBRATED, Calibration, fit
from vitrail.evaluation.metrics import (
    Features,
    Metrics,
    Precision,
    measure,
    predict_logits,
    quick_scores,
)
from vitrail.evaluation.report import draw_each, plot_run
from vitrail.explain.training_pictures import choose_images, draw_attention
from vitrail.inference.classifier import Classifier
from vitrail.model.layers import ConvStem
from vitrail.model.vit import VisionTransformer
from vitrail.runtime import distributed, rng
from vitrail.runtime.files import require_writable, write_json, write_json_lines
from vitrail.runtime.hardware import (
    choose_compile,
    choose_precision,
    choose_rank_device,
    describe_environment,
)
from vitrail.training.loop import Update, count_flops, train
from vitrail.training.optim import multiplier
from vitrail.training.run_folder import (
    EpochRow,
    has_test,
    hold,
    list_files,
    load_on_all_ranks,
    locate_arrays,
    log_test_use,
    read_rows,
    require_run_folder,
    require_unused,
    restore_files,
    with_absolute_path,
    write_fingerprints,
)
from vitrail.training.state import TrainingState, first_not_finite, prune, quality, recover
from vitrail.training.trackers import Trackers, check_trackers
from vitrail.weights import pretrained
from vitrail.weights.checkpoint import (
    CheckpointInfo,
    load_info,
    read_pointer,
    save_calibration,
    save_checkpoint,
    save_weights_file,
    step_of,
    write_pointer,
)

WHITENING_PIXELS = 2_000_000
"""Number of training pixels from which the conv stem's whitening kernels are computed."""

EVALUATION_CHUNK = 500
"""Number of images that each rank evaluates between two checks for a stop request."""


@dataclasses.dataclass(frozen=True)
class EpochEnd:
    """The end of an epoch, with its line of metrics.jsonl."""

    row: EpochRow
    best: bool


class Run:
    """A training run. Iterate over train(), then call finish().

    With several ranks (see distributed.py) each has a Run; only the leader writes to the folder.

    Example::

        run = Run.start(config, new_folder(Path("output"), "", "quick"))
        for event in run.train():
            ...
        result = run.finish()

    Raises:
        DataError, ConfigError: the data are missing, or do not match the settings.
        OutputError: another process is writing to the folder.
    """

    def __init__(
        self, config: Config, folder: Path, *, fresh: bool = True, manifest: Manifest | None = None
    ) -> None:
        check_trackers(config.run)  # fails now rather than after hours of training
        if config.run.model_path is not None:
            distributed.on_leader(require_writable, config.run.model_path)
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.lock = hold(folder)
        self.device = choose_rank_device(config.run.device)
        distributed.require_work(config.training.batch_size)
        if config.run.monitor == "test" and not has_test(config, manifest):
            raise ConfigError("monitor is test, but there is no test split: give validation")
        wanted: list[Split] = ["train", *dict.fromkeys(("validation", config.run.monitor))]
        loaded = load_on_all_ranks(config, manifest, *wanted)
        self.manifest, splits = loaded.manifest, dict(loaded.images)
        train_set = splits.pop("train")
        self.config = config = _complete(config, train_set.classes, loaded.pixel_range)
        self.classes, self.train_images = train_set.classes, len(train_set)
        self.monitored = {name: images for name, images in splits.items() if len(images)}
        if config.run.stop_at_accuracy is not None and "validation" not in self.monitored:
            raise ConfigError("stop_at_accuracy needs validation images: give validation_images")
        self.plotted_images = choose_images(splits["validation"], config.run.attention_epochs)
        self.notices: list[str] = []
        self.problems: list[str] = []
        """What failed without ending the run, one line each."""
        self.state = TrainingState.start(self._build_model(train_set, fresh), config.training)
        self.batches = Batches(train_set, config, device=self.device)
        self.rows: list[EpochRow] = []
        self.best: Mapping[str, Any] = {}
        """Row of the best epoch so far."""
        self.saved: Path | None = None
        """The last checkpoint that was written or loaded."""

    def _build_model(self, train_set: ImageSet, fresh: bool) -> VisionTransformer:
        """Return the initialized model; a resumed run overwrites its weights."""
        config = self.config
        with rng.seeded(config.run.seed, "init", device=self.device):
            model = VisionTransformer(config.model).to(self.device)
        if fresh and config.training.init:
            self.notices = pretrained.start_from(model, config.training, self.classes)
        elif fresh and isinstance(model.stem, ConvStem):
            height, width = config.model.image_hw
            some = train_set.sample(max(1, WHITENING_PIXELS // (height * width)))
            raw_BCHW = some.raw_BCHW.to(self.device)
            model.stem.whiten(normalize(raw_BCHW, config.data.mean, config.data.std))
        return model

    @classmethod
    def start(cls, config: Config, folder: Path, manifest: Manifest | None = None) -> "Run":
        """Begin a new run in an empty folder (see run_folder.new_folder).

        ``manifest`` lists the files of a folder dataset, if they were scanned already.

        Raises:
            ConfigError: the folder is not empty.
        """
        distributed.on_leader(require_unused, folder)
        config = with_absolute_path(config)
        run = cls(config, folder, manifest=distributed.on_leader(list_files, config, manifest))
        distributed.on_leader(run._write_settings)
        return run

    @classmethod
    def resume(cls, folder: Path, config: Config) -> "Run":
        """Resume from the newest valid checkpoint of a run folder; without one, start over.

        The settings are those in its config.json; only RESUME_OVERRIDES may differ.

        Raises:
            CheckpointError: no checkpoint is valid, or the newest has different settings.
            OutputError: another process is writing to the folder.
        """
        distributed.on_leader(require_run_folder, folder)  # the lock would create the folder
        config = dataclasses.replace(config, data=locate_arrays(config.data, folder))
        config = with_absolute_path(config)
        held = hold(folder)  # until the run itself holds it
        saved, rows = distributed.on_leader(lambda: (recover(folder, config), read_rows(folder)))
        manifest, added = distributed.on_leader(restore_files, config, folder)
        run = cls(config, folder, fresh=saved is None, manifest=manifest)
        if run.manifest != manifest:
            raise DataError(f"{config.data.data_path}: some pictures can no longer be decoded")
        if added:
            run.notices.append(f"ignored {added:,} pictures that were added since the run began")
        del held
        if saved is None:
            run.notices.append("the run stopped before its first checkpoint: starting over")
            distributed.on_leader(run._write_settings)
            return run
        run.state.restore(saved.weights, saved.training, saved.info.numbers)
        run.rows = [row for row in rows if row["step"] <= run.state.step]
        run.best, run.saved = saved.best, saved.folder
        run.notices += saved.notices
        distributed.on_leader(write_json_lines, folder / "metrics.jsonl", run.rows)
        return run

    @property
    def precision(self) -> Precision:
        """The number format chosen for matrix products."""
        dtype = choose_precision(self.config.training.precision, self.device)
        return "bfloat16" if dtype == torch.bfloat16 else "float32"

    @property
    def compiled(self) -> bool:
        """Whether the model is compiled, with ``auto`` resolved."""
        return choose_compile(self.config.training.compile, self.device, self.total_steps)

    @property
    def total_steps(self) -> int:
        """Number of updates in the whole run."""
        return self.batches.steps

    def is_enough(self) -> bool:
        """Return whether the latest epoch reached ``stop_at_accuracy``."""
        goal = self.config.run.stop_at_accuracy
        return bool(self.rows) and goal is not None and self.rows[-1]["validation_accuracy"] >= goal

    def is_complete(self) -> bool:
        """Return whether the last epoch was evaluated, or ``stop_at_accuracy`` reached."""
        return self.is_enough() or (bool(self.rows) and self.rows[-1]["step"] == self.total_steps)

    def train(self, stopping: Callable[[], bool] = lambda: False) -> Iterator[Update | EpochEnd]:
        """Train to the end, yielding every update and the end of every epoch.

        You may break out of the loop at any time; save() then keeps all progress. ``stopping`` is
        polled while an epoch is evaluated, which may take a while. If it returns True, the
        evaluation is postponed; break out after that update, or the evaluation starts over.

        Raises:
            TrainingError: the loss, the gradient or a weight is not finite.
            OutputError: the run folder cannot be written.
        """
        self._synchronize()
        try:
            with Trackers(self.config, self.folder, self.problems) as trackers:
                yield from self._events(trackers, stopping)
        except (TrainingError, OutputError) as error:
            saved = self.saved
            kept = f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved"
            raise type(error)(f"{error}; {kept}") from error

    def _events(
        self, trackers: Trackers, stopping: Callable[[], bool]
    ) -> Iterator[Update | EpochEnd]:
        evaluated = self.rows[-1]["step"] if self.rows else 0
        ended = self.state.step % self.batches.steps_per_epoch == 0
        if ended and self.state.step > evaluated and (end := self._end_epoch(trackers, stopping)):
            yield end  # of an epoch that was stopped during its evaluation
        if self.is_enough():
            return
        for update in train(self.state, self.batches, self.config):
            # Before the update is yielded, so that breaking out then loses nothing of the epoch.
            end = self._end_epoch(trackers, stopping) if update.ends_epoch else None
            yield update
            if update.ends_epoch and (end := end or self._end_epoch(trackers, lambda: False)):
                yield end
                if self.is_enough():
                    return

    def _end_epoch(self, trackers: Trackers, stopping: Callable[[], bool]) -> EpochEnd | None:
        """Evaluate the epoch, write its row, save and prune checkpoints; None when stopping."""
        began = time.perf_counter()
        self._synchronize()
        step, per_epoch = self.state.step, self.batches.steps_per_epoch
        training, epoch = self.config.training, step // per_epoch
        loss, accuracy = self.state.tally.means()
        scores = self._score_monitored(epoch, stopping)
        if scores is None:
            return None
        share = multiplier(step - 1, training, steps_per_epoch=per_epoch)
        row: EpochRow = {
            "epoch": epoch,
            "step": step,
            "learning_rate": training.learning_rate * share,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "seconds": round(self.state.seconds, 3),
            "images_per_second": _speed(self.train_images * epoch, self.state.seconds),
            **scores,  # type: ignore[typeddict-item]
            "evaluation_seconds": round(time.perf_counter() - began, 3),
        }
        best = quality(row) > quality(self.best)
        self.rows.append(row)
        self.saved = distributed.on_leader(self._write_epoch, row, best)
        self.best = row if best else self.best
        trackers.write(row, self._draw_attention(row))
        return EpochEnd(row, best)

    def _synchronize(self) -> None:
        """Copy the leader's state to all ranks: different processors round differently."""
        state = {**self.state.weights(), **self.state.tensors()}
        distributed.copy_from_leader(state.values())

    def _score_monitored(self, epoch: int, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Evaluate the monitored splits in the precision of training; None when stopping."""
        scores: dict[str, float] = {}
        for name, images in self.monitored.items():
            if name == "test":
                purpose = f"curve, epoch {epoch}"
                distributed.on_leader(log_test_use, self.folder, purpose, len(images))
            parts = []
            together = EVALUATION_CHUNK * distributed.count()
            for indices_B in torch.arange(len(images)).split(together):
                if distributed.highest(int(stopping())):
                    return None
                chunk, model = images.take(indices_B), self.state.eval_model
                parts.append(self._logits(model, chunk, self.precision))
            accuracy, loss = quick_scores(torch.cat(parts), images.labels_B)
            scores |= {f"{name}_accuracy": accuracy, f"{name}_loss": loss}
        return scores

    def _logits(
        self, model: nn.Module, images: ImageSet, precision: Precision = "float32"
    ) -> Tensor:
        """Return the logits of all images, computed by all ranks together."""
        data, device = self.config.data, self.device
        return predict_logits(
            model, images, mean=data.mean, std=data.std, device=device,
            batch_size=EVALUATION_CHUNK, precision=precision,
        )  # fmt: skip

    def _draw_attention(self, row: EpochRow) -> Path | None:
        """Draw the attention maps of this epoch if ``attention_epochs`` asks for it."""
        every = self.config.run.attention_epochs
        if not every or row["epoch"] % every or not distributed.is_leader():
            return None
        name, model = f"epoch-{row['epoch']:04}.png", self.state.eval_model
        draw = {name: lambda path: draw_attention(model, self.plotted_images, self.config, path)}
        problems = draw_each(draw, self.folder / "attention")
        self.problems += problems
        return None if problems else self.folder / "attention" / name

    # --- what the leader writes ---

    def _write_settings(self) -> None:
        """Write the settings, the files of the data, and the software and hardware."""
        if self.manifest is not None:
            self.manifest.save(self.folder)
        write_fingerprints(self.config, self.folder)
        write_json(self.folder / "config.json", to_json(self.config))
        write_json(self.folder / "env.json", describe_environment(self.device, self.precision))

    def _write_epoch(self, row: EpochRow, best: bool) -> Path | None:
        """Write the rows; save and prune checkpoints. Return the last checkpoint."""
        run = self.config.run
        write_json_lines(self.folder / "metrics.jsonl", self.rows)
        due = self.is_complete() or row["epoch"] % run.checkpoint_epochs == 0
        # Without validation every epoch is the best so far, which is no reason to save it.
        if due or (best and "validation_accuracy" in row):
            checkpoint = self._write_checkpoint()
            if best:
                write_pointer(self.checkpoints, "BEST", checkpoint)
            if run.keep_checkpoints:
                prune(self.checkpoints, run.keep_checkpoints)
        return self.saved

    def save(self) -> Path:
        """Save a checkpoint of the current step, unless it exists; LAST will name it.

        Raises:
            TrainingError: a weight is not finite.
            OutputError: the run folder cannot be written.
        """
        self.saved = distributed.on_leader(self._write_checkpoint)
        return self.saved

    def _write_checkpoint(self) -> Path:
        folder = self.checkpoints / f"step-{self.state.step:07}"
        row: Mapping[str, Any] = self.rows[-1] if self.rows else {}
        if folder == self.saved:
            with contextlib.suppress(CheckpointError):  # it was removed
                if load_info(folder).metrics == row:
                    return folder
        weights, training = self.state.weights(), self.state.tensors()
        broken = first_not_finite({**weights, **training})
        if broken is not None:
            raise TrainingError(f"{broken} is not finite after update {self.state.step}: not saved")
        info = CheckpointInfo(self.config, self.classes, self.state.numbers(), row)
        save_checkpoint(folder, info, weights=weights, training=training)
        self.saved = folder
        write_pointer(self.checkpoints, "LAST", folder)
        if not (self.checkpoints / "BEST").exists():
            write_pointer(self.checkpoints, "BEST", folder)
        if not (self.folder / "config.json").exists():  # somebody removed the folder
            self._write_settings()
        return folder

    def finish(self) -> dict[str, Any]:
        """Test the best model once, if there is a test split; write result.json and the plots.

        ``problems`` then lists the plots and weights that could not be written.
        """
        best = distributed.on_leader(  # on the CPU, so that it can be sent to every rank
            lambda: pretrained.load(read_pointer(self.checkpoints, "BEST"), device="cpu")
        )
        metrics, calibration = None, self._calibrate(best)
        if has_test(self.config, self.manifest):
            test = load_on_all_ranks(self.config, self.manifest, "test").images["test"]
            purpose = f"result of {Path(best.source).name}"
            distributed.on_leader(log_test_use, self.folder, purpose, len(test))
            logits_BY = self._logits(best.model.to(self.device), test)
            metrics = measure(
                logits_BY,
                test.labels_B,
                classes=self.classes,
                calibration=calibration or UNCALIBRATED,
            )
        return distributed.on_leader(self._write_result, best, metrics, calibration)

    def _calibrate(self, best: Classifier) -> Calibration | None:
        """Fit the calibration to the validation images, if any, and save it with the weights."""
        validation = self.monitored.get("validation")
        if validation is None:
            return None
        model = best.model.to(self.device)
        features_BD = self._logits(Features(model), validation)
        with torch.no_grad():
            logits_BY = model.head(features_BD.to(self.device)).cpu()
        smoothing = self.config.training.label_smoothing
        calibration = fit(logits_BY, validation.labels_B, features_BD, smoothing=smoothing)
        distributed.on_leader(save_calibration, Path(best.source), calibration)
        return calibration

    def _write_result(
        self, best: Classifier, metrics: Metrics | None, calibration: Calibration | None
    ) -> dict[str, Any]:
        if self.config.run.model_path is not None:
            try:
                _write_weights(best, self.folder.name)
            except OutputError as error:
                self.problems.append(
                    f"{error}; write the weights elsewhere with: vitrail convert {self.folder} FILE"
                )
        result = self._summarize(best, metrics)
        result["temperature"] = calibration and calibration.temperature
        write_json(self.folder / "result.json", result)  # from now on the run counts as finished
        data, smoothing = self.config.data.dataset, self.config.training.label_smoothing
        self.problems += plot_run(self.rows, metrics, self.folder, data, smoothing)
        return result

    def _summarize(self, best: Classifier, metrics: Metrics | None) -> dict[str, Any]:
        """Return the content of result.json."""
        step, epochs = step_of(Path(best.source)), self.rows[-1]["epoch"]
        row: dict[str, Any] = next((dict(row) for row in self.rows if row["step"] == step), {})
        names = {"accuracy": "validation_accuracy", "loss": "validation_loss"}
        images, trains_all = self.train_images * epochs, not self.config.training.freeze_backbone
        return {
            "epochs": epochs,
            "best_epoch": row.get("epoch"),
            "validation": {n: row[key] for n, key in names.items() if key in row} or None,
            "parameters": sum(parameter.numel() for parameter in best.model.parameters()),
            "train_images": self.train_images,
            "petaflops": float(f"{count_flops(self.config.model)[trains_all] * images / 1e15:.4g}"),
            "seconds": round(self.state.seconds, 1),
            "evaluation_seconds": round(sum(r.get("evaluation_seconds", 0) for r in self.rows), 1),
            "images_per_second": _speed(images, self.state.seconds),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "precision": self.precision,
            "compiled": self.compiled,
            "test": metrics and metrics.to_json(),
        }


def _speed(images: int, seconds: float) -> float:
    """Return images per second, even if the clock did not advance."""
    return round(images / max(seconds, 1e-9), 1)


def _write_weights(best: Classifier, run_name: str) -> None:
    """Write the best weights to ``model_path``; epochs count from 0, as in the reference."""
    info = load_info(Path(best.source))
    run, model = info.config.run, info.config.model
    size = "x".join(map(str, dict.fromkeys(model.image_hw)))
    name = run.model_name or f"vit-layer{model.n_layers}-{size}-{info.config.data.dataset}"
    file = f"{name}-{info.metrics['epoch'] - 1:03}.safetensors"
    path = Path(run.model_path or "model") / run_name / file
    save_weights_file(path, info, best.model.state_dict())


def _complete(
    config: Config, classes: tuple[str, ...], pixel_range: tuple[float, float] | None
) -> Config:
    """Return the settings with the number of classes and the pixel range of the loaded dataset.

    Raises:
        ConfigError: the settings ask for a different number of classes.
    """
    asked, there = config.model.n_classes, len(classes)
    if asked not in (0, there):
        raise ConfigError(
            f"n_classes is {asked}, but the dataset has {there} classes: leave it out"
        )
    data = config.data
    if pixel_range is not None:
        data = dataclasses.replace(data, pixel_range=pixel_range)
    model = dataclasses.replace(config.model, n_classes=there)
    return dataclasses.replace(config, model=model, data=data)
