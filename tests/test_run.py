"""A run: its folder, bit-for-bit resuming, and what stops it."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import vitrail
from vitrail.config.files import from_json
from vitrail.config.settings import Config
from vitrail.data.images import normalize
from vitrail.errors import CheckpointError, ConfigError, OutputError, TrainingError
from vitrail.evaluation.calibration import Calibration, fit
from vitrail.evaluation.metrics import Features, predict_logits, quick_scores
from vitrail.model.layers import WhitePatches
from vitrail.training.loop import Update, count_flops
from vitrail.training.run import EpochEnd, Run
from vitrail.training.run_folder import new_folder
from vitrail.training.state import prune, quality
from vitrail.weights.checkpoint import load_training, load_weights, load_weights_file, read_pointer

pytestmark = pytest.mark.usefixtures("rough_plots")


def run_to_end(config: Config, folder: Path) -> Run:
    folder.mkdir()
    run = Run.start(config, folder)
    for _ in run.train():
        pass
    return run


def final(folder: Path) -> dict[str, Tensor]:
    last = read_pointer(folder / "checkpoints", "LAST")
    return {**load_weights(last), **load_training(last)}


def test_a_run_leaves_its_folder_complete(
    tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vitrail.training.run.fit", lambda *_, smoothing: Calibration(0.5, smoothing=smoothing)
    )
    training = dataclasses.replace(tiny_run.training, label_smoothing=0.2)
    run = run_to_end(dataclasses.replace(tiny_run, training=training), tmp_path / "a")
    result = run.finish()
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {
        "config.json", "env.json", "metrics.jsonl", "result.json", "test_uses.jsonl",
        "graph_loss.png", "graph_accuracy.png", "confusion_matrix.png", "calibration.png",
        "checkpoints", ".lock",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [3, 6, 9]
    assert result["test"]["images"] == 70
    assert result["train_images"] == 90
    operations = count_flops(run.config.model)[1] * 90 * 3
    assert result["petaflops"] == pytest.approx(operations / 1e15, rel=1e-3)
    assert result["validation"]["accuracy"] == max(row["validation_accuracy"] for row in rows)
    uses = (tmp_path / "a/test_uses.jsonl").read_text().splitlines()
    assert len(uses) == 1
    classifier = vitrail.load(tmp_path / "a", device="cpu")
    assert len(classifier.classes) == 10
    assert classifier.calibration.temperature == result["temperature"] == 0.5
    assert classifier.calibration.smoothing == result["test"]["smoothing"] == 0.2
    assert result["test"]["temperature"] == 0.5
    kept = sorted(path.name for path in (tmp_path / "a/checkpoints").iterdir())
    assert {"BEST", "LAST", "step-0000009"} <= set(kept)
    assert len(kept) <= 4


def test_a_run_whitens_the_patches_of_its_training_images(tiny_run: Config, tmp_path: Path) -> None:
    model = dataclasses.replace(tiny_run.model, stem="conv")
    run = Run.start(dataclasses.replace(tiny_run, model=model), tmp_path / "a")
    expected = WhitePatches(3)
    raw_BCHW = run.batches.raw_BCHW  # fewer than the images that are used at most
    expected.whiten(normalize(raw_BCHW, run.config.data.mean, run.config.data.std))
    assert torch.allclose(run.state.model.stem[0].weight, expected.weight)


@pytest.mark.parametrize("stop_at", [1, 3, 5])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_run: Config, tmp_path: Path, stop_at: int, optimizer: str
) -> None:
    training = dataclasses.replace(tiny_run.training, optimizer=optimizer)
    config = dataclasses.replace(tiny_run, training=training)
    one_go = run_to_end(config, tmp_path / "one-go")
    (tmp_path / "parts").mkdir()
    first = Run.start(config, tmp_path / "parts")
    for event in first.train():
        if isinstance(event, Update) and event.step == stop_at:
            break
    first.save()
    second = Run.resume(tmp_path / "parts", first.config)
    for _ in second.train():
        pass
    one, other = final(tmp_path / "one-go"), final(tmp_path / "parts")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in run.rows]
        for run in (one_go, second)
    ]
    assert timeless[0] == timeless[1]


def test_training_learns_and_accumulation_changes_nothing(tiny_run: Config, tmp_path: Path) -> None:
    plain = dataclasses.replace(
        tiny_run, model=dataclasses.replace(tiny_run.model, dropout=0.0, n_classes=0)
    )
    losses = []
    for accumulate in (1, 4):
        training = dataclasses.replace(
            plain.training, accumulate=accumulate, precision="float32", learning_rate=3e-3
        )
        run = run_to_end(dataclasses.replace(plain, training=training), tmp_path / str(accumulate))
        losses.append([row["train_loss"] for row in run.rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_a_corrupt_newest_checkpoint_is_skipped(tiny_run: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(
        tiny_run, run=dataclasses.replace(tiny_run.run, keep_checkpoints=0)
    )
    finished = run_to_end(config, tmp_path / "a")
    expected = final(tmp_path / "a")
    newest = tmp_path / "a/checkpoints/step-0000009/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = Run.resume(tmp_path / "a", finished.config)
    assert resumed.state.step == 6
    assert "step-0000009" in resumed.notices[0]
    for _ in resumed.train():
        pass
    for name, tensor in final(tmp_path / "a").items():
        assert torch.equal(tensor, expected[name])


def test_a_loss_that_is_not_finite_stops_before_the_update(
    tiny_run: Config, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    run = Run.start(tiny_run, tmp_path / "a")
    events = run.train()
    next(events)
    weights = {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}
    with torch.no_grad():
        run.state.model.head.fc2.bias[0] = float("nan")
        weights["head.fc2.bias"][0] = float("nan")
    with pytest.raises(TrainingError, match="update 2: stopped before applying it"):
        next(events)
    for name, tensor in run.state.model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), weights[name].nan_to_num(7)), name
    assert run.state.step == 1


def test_the_reference_curve_is_drawn_on_test_and_logged(tiny_run: Config, tmp_path: Path) -> None:
    sections = {"data": {"validation_images": 0}, "run": {"monitor": "test"}}
    config = from_json(sections, tiny_run)
    run = run_to_end(config, tmp_path / "a")
    run.finish()
    assert all("test_accuracy" in row and "validation_accuracy" not in row for row in run.rows)
    uses = (tmp_path / "a/test_uses.jsonl").read_text().splitlines()
    assert len(uses) == 4
    assert read_pointer(run.checkpoints, "BEST").name == "step-0000009"


def first_is_best(row: dict[str, Any]) -> float:
    return -row.get("epoch", 1000)


def test_the_weights_file_holds_the_best_epoch_and_its_metrics(
    tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.training.run.quality", first_is_best)
    sections = {"run": {"model_path": str(tmp_path / "model"), "model_name": "mine"}}
    run = run_to_end(from_json(sections, tiny_run), tmp_path / "a")
    run.finish()
    (written,) = (tmp_path / "model" / "a").iterdir()
    assert written.name == "mine-000.safetensors"
    info, weights = load_weights_file(written)
    assert info.metrics == run.rows[0]
    assert info.numbers["step"] == 3
    best = vitrail.load(tmp_path / "a", device="cpu").model.state_dict()
    assert all(torch.equal(weights[name], best[name]) for name in best)
    assert not torch.equal(best["head.fc2.bias"], run.state.weights()["head.fc2.bias"])


def test_without_validation_the_weights_file_has_the_references_name(
    tiny_run: Config, tmp_path: Path
) -> None:
    sections = {"data": {"validation_images": 0}, "run": {"model_path": str(tmp_path / "model")}}
    result = run_to_end(from_json(sections, tiny_run), tmp_path / "a").finish()
    assert (result["temperature"], result["test"]["temperature"]) == (None, 1)
    (written,) = (tmp_path / "model" / "a").iterdir()
    assert written.name == "vit-layer1-32-shapes-002.safetensors"
    assert load_weights_file(written)[0].metrics["epoch"] == 3


@pytest.mark.parametrize(
    ("validation_images", "every", "saved"),
    [(0, 1, [3, 6, 9]), (0, 2, [6, 9]), (0, 3, [9]), (10, 3, [3, 9])],
)
def test_checkpoints_are_saved_every_n_epochs_and_at_the_end(
    tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    validation_images: int, every: int, saved: list[int],
) -> None:  # fmt: skip
    if validation_images:  # the best is saved as well
        monkeypatch.setattr("vitrail.training.run.quality", first_is_best)
    sections = {
        "data": {"validation_images": validation_images},
        "run": {"checkpoint_epochs": every, "keep_checkpoints": 0},
    }
    (tmp_path / "a").mkdir()
    run = Run.start(from_json(sections, tiny_run), tmp_path / "a")
    for event in run.train():
        if isinstance(event, EpochEnd):
            names = sorted(path.name for path in run.checkpoints.glob("step-*"))
            assert names == [f"step-{step:07}" for step in saved if step <= event.row["step"]]
            if names and not validation_images:
                assert read_pointer(run.checkpoints, "BEST").name == names[-1]


def test_a_run_stops_after_the_epoch_that_is_accurate_enough(
    tiny_run: Config, tmp_path: Path
) -> None:
    for goal, epochs in ((0.0, 1), (1.0, 3)):
        sections = {"run": {"stop_at_accuracy": goal, "model_path": str(tmp_path / str(epochs))}}
        run = run_to_end(from_json(sections, tiny_run), tmp_path / f"run {goal}")
        assert [row["epoch"] for row in run.rows] == list(range(1, epochs + 1))
        assert read_pointer(run.checkpoints, "LAST").name == f"step-{3 * epochs:07}"
        if goal == 0:
            run.finish()
            (written,) = (tmp_path / "1").rglob("*.safetensors")
            assert written.name.endswith("-000.safetensors")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_average_is_evaluated_as_it_is_saved(
    tiny_run: Config, tmp_path: Path, precision: Literal["float32", "bfloat16"]
) -> None:
    assert tiny_run.training.ema_decay
    training = dataclasses.replace(tiny_run.training, precision=precision)
    run = run_to_end(dataclasses.replace(tiny_run, training=training), tmp_path / "a")
    assert run.precision == precision
    saved = vitrail.load(read_pointer(tmp_path / "a/checkpoints", "LAST"), device="cpu")
    images, data = run.monitored["validation"], run.config.data
    logits_BY = predict_logits(
        saved.model,
        images,
        mean=data.mean,
        std=data.std,
        device=torch.device("cpu"),
        precision=run.precision,
    )
    assert quick_scores(logits_BY, images.labels_B)[1] == run.rows[-1]["validation_loss"]


def test_each_epoch_is_one_event(tiny_run: Config, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    events = list(Run.start(tiny_run, tmp_path / "a").train())
    assert [e.row["epoch"] for e in events if isinstance(e, EpochEnd)] == [1, 2, 3]
    assert [e.step for e in events if isinstance(e, Update)] == list(range(1, 10))


def test_a_number_of_classes_that_differs_from_the_data_is_refused(
    tiny_run: Config, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="n_classes is 7, but the dataset has 10"):
        Run.start(from_json({"model": {"n_classes": 7}}, tiny_run), tmp_path)


def test_folders_are_numbered_and_an_existing_name_is_refused(tmp_path: Path) -> None:
    names = [new_folder(tmp_path, "", "quick").name for _ in range(3)]
    assert names == ["quick", "quick-2", "quick-3"]
    (tmp_path / "quick/config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--resume"):
        new_folder(tmp_path, "quick", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be created"):
        new_folder(tmp_path / "file", "", "quick")


def test_a_folder_that_contains_a_run_is_not_overwritten(tiny_run: Config, tmp_path: Path) -> None:
    run_to_end(tiny_run, tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="already exists: give another"):
        Run.start(tiny_run, tmp_path / "a")
    for path, content in before.items():
        assert path.read_bytes() == content
    Run.start(tiny_run, tmp_path / "new")  # a missing folder is created


def test_resuming_a_missing_run_creates_nothing(tiny_run: Config, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        Run.resume(tmp_path / "nope" / "typo", tiny_run)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_resume_is_one_clear_error(tiny_run: Config, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        Run.resume(tmp_path, tiny_run)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        Run.resume(tmp_path, tiny_run)


def test_the_best_epoch_has_the_highest_accuracy_then_the_lowest_loss() -> None:
    def row(epoch: int, accuracy: float, loss: float) -> dict[str, float]:
        scores = {"validation_accuracy": accuracy, "validation_loss": loss}
        return {"epoch": epoch, "step": 3 * epoch, **scores}

    inside, unscored = {"step": 20}, [{"epoch": n, "step": 3 * n} for n in (1, 2)]
    assert quality({}) < quality(inside) < quality(unscored[0]) < quality(unscored[1])
    assert quality(row(2, 0.5, 1.0)) > quality(row(1, 0.4, 0.1))
    assert quality(row(2, 0.5, 0.9)) > quality(row(1, 0.5, 1.0))
    assert quality(row(2, 0.5, 1.0)) < quality(row(1, 0.5, 1.0))
    assert quality(row(2, 0.3, 0.1)) < quality(row(1, 0.5, 1.0))
    assert quality(row(1, 0.1, 2.0)) > quality(inside)


def test_pruning_keeps_the_best_and_the_newest(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        (tmp_path / f"step-{step:07}").mkdir()
    (tmp_path / "BEST").write_text("step-0000003")
    (tmp_path / "LAST").write_text("step-0000012")
    prune(tmp_path, 2)
    kept = {path.name for path in tmp_path.glob("step-*")}
    assert kept == {"step-0000003", "step-0000009", "step-0000012"}


def test_another_seed_gives_other_first_weights(tiny_run: Config, tmp_path: Path) -> None:
    one, two = (
        Run.start(from_json({"run": {"seed": s}}, tiny_run), tmp_path / str(s)).state.weights()
        for s in (1, 2)
    )
    assert not torch.equal(one["blocks.0.mlp.fc1.weight"], two["blocks.0.mlp.fc1.weight"])


def test_the_calibration_is_fitted_to_the_labels_of_the_validation_images(
    tiny_run: Config, tmp_path: Path
) -> None:
    run = Run.start(from_json({"training": {"label_smoothing": 0.1}}, tiny_run), tmp_path / "a")
    for _ in run.train():
        pass
    run.finish()
    best, images = vitrail.load(tmp_path / "a", device="cpu"), run.monitored["validation"]
    where: Any = {"mean": best.mean, "std": best.std, "device": torch.device("cpu")}
    logits_BY = predict_logits(best.model, images, **where)
    features_BD = predict_logits(Features(best.model), images, **where)
    expected = fit(logits_BY, images.labels_B, features_BD, smoothing=0.1)
    assert best.calibration.temperature == pytest.approx(expected.temperature, rel=1e-4)


def test_a_row_sums_up_the_updates_of_its_epoch(tiny_run: Config, tmp_path: Path) -> None:
    run = Run.start(tiny_run, tmp_path / "a")
    updates: list[Update] = []
    for event in run.train():
        if isinstance(event, Update):
            updates.append(event)
            continue
        row, images = event.row, sum(u.images for u in updates)
        assert images == run.train_images
        loss = sum(u.loss * u.images for u in updates) / images
        assert row["train_loss"] == pytest.approx(loss)
        assert row["train_accuracy"] == pytest.approx(sum(u.correct for u in updates) / images)
        assert row["learning_rate"] == pytest.approx(updates[-1].learning_rate)
        updates.clear()
    assert Run.resume(tmp_path / "a", run.config).state.seconds == run.state.seconds > 0


def test_a_resumed_run_that_is_accurate_enough_stays_as_it_is(
    tiny_run: Config, tmp_path: Path
) -> None:
    config = from_json({"run": {"stop_at_accuracy": 0.0}}, tiny_run)
    run = Run.start(config, tmp_path / "a")
    for _ in run.train():
        pass
    again = Run.resume(tmp_path / "a", run.config)
    assert list(again.train()) == []
    assert again.state.step == run.state.step == 3
