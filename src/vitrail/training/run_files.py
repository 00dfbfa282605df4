"""What a run writes into its folder; with several processes, the leader's work."""

from pathlib import Path
from typing import Any

import torch

from vitrail.config.files import to_json
from vitrail.config.settings import Config
from vitrail.data.batches import Batches
from vitrail.data.images import ImageSet
from vitrail.data.manifest import Manifest
from vitrail.errors import CheckpointError, OutputError, TrainingError
from vitrail.evaluation.metrics import measure
from vitrail.evaluation.plots import draw_each, plot_run
from vitrail.explain.attention_snapshots import draw_attention
from vitrail.inference.classifier import Classifier
from vitrail.runtime import distributed
from vitrail.runtime.devices import choose_compile, choose_precision
from vitrail.runtime.environment import describe_environment
from vitrail.runtime.files import write_json, write_json_lines
from vitrail.training.results import summarise, write_weights
from vitrail.training.run_folder import prune
from vitrail.training.state import TrainingState, first_not_finite
from vitrail.weights.checkpoint import CheckpointInfo, load_info, save_checkpoint, write_pointer


class RunFiles:
    """The half of a Run that writes: settings, epochs, checkpoints, the result."""

    config: Config
    folder: Path
    checkpoints: Path
    classes: tuple[str, ...]
    device: torch.device
    state: TrainingState
    batches: Batches
    watched: ImageSet
    manifest: Manifest | None
    rows: list[dict[str, Any]]
    saved: Path | None
    train_images: int
    problems: list[str]
    """What failed without ending the run, one line each."""

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

    def is_enough(self) -> bool:
        """Tell whether the latest epoch reached the accuracy to stop at."""
        goal = self.config.run.stop_at_accuracy
        return bool(self.rows) and goal is not None and self.rows[-1]["validation_accuracy"] >= goal

    def write_settings(self) -> None:
        """Write what a run is known by: its settings, software and hardware."""
        if self.manifest is not None:
            self.manifest.save(self.folder)
        write_json(self.folder / "config.json", to_json(self.config))
        write_json(self.folder / "env.json", describe_environment(self.device, self.precision))

    def write_epoch(self, row: dict[str, Any], best: bool) -> Path | None:
        """Write an epoch's line; save and prune checkpoints. The leader's work."""
        run, last = self.config.run, row["step"] == self.total_steps or self.is_enough()
        write_json_lines(self.folder / "metrics.jsonl", self.rows)
        due = last or row["epoch"] % run.checkpoint_epochs == 0
        # Without validation every epoch is the best so far: no reason to save it.
        if due or (best and "validation_accuracy" in row):
            checkpoint = self.write_checkpoint()
            if best:
                write_pointer(self.checkpoints, "BEST", checkpoint)
            if run.keep_checkpoints:
                prune(self.checkpoints, run.keep_checkpoints)
        return self.saved

    def attention_picture(self, row: dict[str, Any]) -> Path | None:
        """Draw what the model looks at now, if this epoch is one of those that are drawn."""
        every = self.config.run.attention_epochs
        if not every or row["epoch"] % every or not distributed.is_leader():
            return None
        name, model = f"epoch-{row['epoch']:04}.png", self.state.best_model
        folder = self.folder / "attention"
        problems = draw_each(
            {name: lambda path: draw_attention(model, self.watched, self.config, path)}, folder
        )
        self.problems += problems
        return None if problems else folder / name

    def write_checkpoint(self) -> Path:
        """Do what save() says. The leader's work."""
        folder = self.checkpoints / f"step-{self.state.step:07}"
        if folder == self.saved and self.is_saved(folder):
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

    def write_result(self, best: Classifier, logits_BY: Any, labels_B: Any) -> dict[str, Any]:
        """Write the weights if asked for, result.json, and the pictures. The leader's work.

        Without a test split there are no logits, and the result has no test score. Weights or
        pictures that cannot be written are noted in ``problems``.
        """
        metrics = None
        if logits_BY is not None:
            metrics = measure(logits_BY, labels_B, classes=self.classes)
        engine = {"precision": self.precision, "compiled": self.compiled}
        summary = summarise(
            best, self.rows, train_images=self.train_images, seconds=self.state.seconds
        )
        result = {**summary, **engine, "test": metrics and metrics.to_json()}
        if self.config.run.model_path is not None:
            try:
                write_weights(best, load_info(Path(best.source)), self.folder.name)
            except OutputError as error:
                self.problems.append(
                    f"{error}; write the weights elsewhere with: vitrail convert {self.folder} FILE"
                )
        write_json(self.folder / "result.json", result)  # from now on the run counts as finished
        self.problems += plot_run(self.rows, metrics, self.folder)
        return result

    def info(self) -> CheckpointInfo:
        """Return what a checkpoint of this moment says of itself."""
        return CheckpointInfo(self.config, self.classes, self.state.numbers(), self.row)

    def is_saved(self, folder: Path) -> bool:
        """Tell whether a checkpoint is there that knows the latest epoch."""
        try:
            return load_info(folder).metrics == self.row
        except CheckpointError:
            return False

    @property
    def row(self) -> dict[str, Any]:
        """The latest epoch's line of metrics.jsonl; empty before the first."""
        return self.rows[-1] if self.rows else {}
