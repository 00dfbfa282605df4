"""Run folders after faults of all kinds, and how resuming repairs them."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitrail import cli
from vitrail.cli.progress import stop_requests
from vitrail.cli.train import follow
from vitrail.config.files import from_json
from vitrail.config.settings import Config
from vitrail.errors import CheckpointError, OutputError, TrainingError
from vitrail.runtime.files import replace_file
from vitrail.training.loop import Update
from vitrail.training.run import EpochEnd, Run
from vitrail.training.run_folder import (
    hold,
    lock_of,
    log_test_use,
    log_test_use_of,
    new_folder,
    release,
)
from vitrail.training.state import checkpoint_folders, recover, remove_incomplete
from vitrail.weights.checkpoint import (
    load_info,
    load_training,
    load_weights,
    read_pointer,
    save_checkpoint,
    step_of,
    write_pointer,
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A run of three epochs, every checkpoint kept. Copy it."""
    config = from_json(
        {
            "model": {"patch_size": 8, "embed_dim": 12, "n_layers": 1, "n_attention_heads": 3},
            "data": {"num_train_images": 90, "validation_images": 40},
            "training": {"batch_size": 40, "epochs": 3, "ema_decay": 0.9},
            "run": {"keep_checkpoints": 0},
        }
    )
    folder = tmp_path_factory.mktemp("finished") / "run"
    folder.mkdir()
    run = Run.start(config, folder)
    for _ in run.train():
        pass
    return folder, run.config


@pytest.fixture
def copied(finished: tuple[Path, Config], tmp_path: Path) -> tuple[Path, Config]:
    return Path(shutil.copytree(finished[0], tmp_path / "run")), finished[1]


def final(folder: Path) -> dict[str, Tensor]:
    last = checkpoint_folders(folder / "checkpoints")[-1]
    return {**load_weights(last), **load_training(last)}


def require_same_end(run: Run, finished: Path) -> None:
    for _ in run.train():
        pass
    one, other = final(run.folder), final(finished)
    assert all(torch.equal(one[name], other[name]) for name in other)
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in rows]
        for rows in (run.rows, Run.resume(finished, run.config).rows)
    ]
    assert timeless[0] == timeless[1]


def test_best_is_repaired_after_a_kill_before_it_was_written(
    copied: tuple[Path, Config],
) -> None:
    folder, config = copied
    checkpoints = folder / "checkpoints"
    best = read_pointer(checkpoints, "BEST")
    other = next(path for path in checkpoint_folders(checkpoints) if path != best)
    write_pointer(checkpoints, "BEST", other)
    run = Run.resume(folder, config)
    assert read_pointer(checkpoints, "BEST") == best
    assert run.best["step"] == step_of(best)
    assert run.notices == []


@pytest.mark.parametrize("name", ["LAST", "BEST"])
@pytest.mark.parametrize("content", [b"", b"step-0000007\n", b"\xff\x00"])
def test_a_modified_pointer_is_refused_and_repaired(
    copied: tuple[Path, Config], name: str, content: bytes
) -> None:
    folder, config = copied
    checkpoints = folder / "checkpoints"
    valid = (checkpoints / name).read_bytes()
    (checkpoints / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_pointer(checkpoints, name)
    Run.resume(folder, config)
    assert (checkpoints / name).read_bytes() == valid


def test_a_hash_after_the_name_is_an_older_versions(copied: tuple[Path, Config]) -> None:
    checkpoints = copied[0] / "checkpoints"
    (checkpoints / "BEST").write_text("step-0000006 0123456789abcdef\n")
    assert read_pointer(checkpoints, "BEST").name == "step-0000006"


def test_a_renamed_checkpoint_is_refused(copied: tuple[Path, Config]) -> None:
    checkpoints = copied[0] / "checkpoints"
    (checkpoints / "step-0000003").rename(checkpoints / "step-0000012")
    with pytest.raises(
        CheckpointError, match=r"step-0000012/checkpoint\.json: its step does not match"
    ):
        load_info(checkpoints / "step-0000012")
    shutil.copytree(checkpoints / "step-0000006", checkpoints / "mine")
    assert load_info(checkpoints / "mine").numbers["step"] == 6


def test_a_lost_best_is_replaced_by_the_best_that_is_left(
    copied: tuple[Path, Config],
) -> None:
    folder, config = copied
    checkpoints = folder / "checkpoints"
    lost = read_pointer(checkpoints, "BEST")
    (lost / "model.safetensors").write_bytes(b"")
    run = Run.resume(folder, config)
    left = [row for row in run.rows if f"step-{row['step']:07}" != lost.name]
    wanted = max(left, key=lambda r: (r["validation_accuracy"], -r["validation_loss"], -r["step"]))
    assert read_pointer(checkpoints, "BEST").name == f"step-{wanted['step']:07}"
    assert run.best["step"] == wanted["step"]
    assert any(lost.name in notice for notice in run.notices)


def test_incomplete_files_of_a_killed_run_are_removed_or_restored(
    copied: tuple[Path, Config],
) -> None:
    checkpoints = copied[0] / "checkpoints"
    complete = {path.name for path in checkpoints.iterdir()}
    (checkpoints / "step-0000009").rename(checkpoints / ".old-step-0000009")
    shutil.copytree(checkpoints / "step-0000003", checkpoints / ".old-step-0000003")
    (checkpoints / ".partial-step-0000009").mkdir()
    (checkpoints / ".doomed-step-0000002").mkdir()
    (checkpoints / ".partial-LAST").write_text("half")
    remove_incomplete(checkpoints)
    assert {path.name for path in checkpoints.iterdir()} == complete


def test_after_a_rename_that_fails_the_next_run_has_the_old_checkpoint_back(
    copied: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied[0] / "checkpoints/step-0000009"
    info, weights, real = load_info(folder), load_weights(folder), Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name.startswith(".partial"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(OutputError, match="No space left"):
            save_checkpoint(folder, info, weights={}, training={})
    recover(*copied)
    assert load_weights(folder).keys() == weights.keys()
    assert not list(folder.parent.glob(".*"))


def test_a_failed_write_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"result\.json: cannot be written: No space left"):
        replace_file(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert path.read_text() == "old"


def test_a_run_without_a_checkpoint_starts_over(
    finished: tuple[Path, Config], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    Run.start(finished[1], tmp_path / "run")
    run = Run.resume(tmp_path / "run", finished[1])
    assert "starting over" in run.notices[0]
    require_same_end(run, finished[0])


def test_an_interrupted_evaluation_is_done_first(
    finished: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.training.run.EVALUATION_CHUNK", 7)
    asked = [0]

    def stopping() -> bool:
        asked[0] += 1
        return asked[0] > 3

    (tmp_path / "run").mkdir()
    run = Run.start(finished[1], tmp_path / "run")
    for event in run.train(stopping):
        assert isinstance(event, Update)
        if asked[0] > 3:
            break
    assert run.state.step == 3
    assert run.rows == []
    run.save()
    again = Run.resume(tmp_path / "run", run.config)
    first = next(iter(again.train()))
    assert isinstance(first, EpochEnd)
    assert first.row["epoch"] == 1
    require_same_end(again, finished[0])


def test_a_loop_that_does_not_stop_loses_no_epoch(
    finished: tuple[Path, Config], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    run = Run.start(finished[1], tmp_path / "run")
    ends = [e.row["epoch"] for e in run.train(lambda: True) if isinstance(e, EpochEnd)]
    assert ends == [1, 2, 3]


def test_settings_that_differ_from_the_checkpoint_are_refused(copied: tuple[Path, Config]) -> None:
    folder, config = copied
    training = dataclasses.replace(config.training, learning_rate=0.1)
    with pytest.raises(CheckpointError, match=r"do not match config\.json: learning_rate 0\.1"):
        Run.resume(folder, dataclasses.replace(config, training=training))
    moved = dataclasses.replace(config.data, num_workers=7)
    assert Run.resume(folder, dataclasses.replace(config, data=moved)).state.step == 9


def test_a_removed_folder_is_created_again(finished: tuple[Path, Config], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run.start(finished[1], folder)
    for event in run.train():
        if isinstance(event, EpochEnd) and event.row["epoch"] == 1:
            shutil.rmtree(folder)
    assert (folder / "config.json").exists()
    assert read_pointer(run.checkpoints, "BEST").is_dir()
    assert Run.resume(folder, run.config).state.step == 9


def test_infinite_weights_are_not_saved(copied: tuple[Path, Config]) -> None:
    run = Run.resume(*copied)
    with torch.no_grad():
        next(iter(run.state.eval_model.parameters()))[0] = float("inf")
    run.saved = None
    with pytest.raises(TrainingError, match="is not finite after update 9: not saved"):
        run.save()


def test_checkpoints_are_ordered_by_number_not_by_letters(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000, 5):
        (tmp_path / f"step-{step:07}").mkdir()
    (tmp_path / "step-x").mkdir()
    steps = [step_of(path) for path in checkpoint_folders(tmp_path)]
    assert steps == [5, 9_999_999, 10_000_000]


def test_a_number_without_end_is_damage(copied: tuple[Path, Config]) -> None:
    path = copied[0] / "checkpoints/step-0000009/checkpoint.json"
    path.write_text('{"format": ' + "1" * 5000 + "}")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: corrupt"):
        load_info(path.parent)


def test_a_corrupt_log_of_test_uses_is_appended_to(tmp_path: Path) -> None:
    (tmp_path / "test_uses.jsonl").write_text('{"half')
    log_test_use(tmp_path, "curve", 5)
    lines = (tmp_path / "test_uses.jsonl").read_text().splitlines()
    assert lines[0] == '{"half'
    assert '"curve"' in lines[1]


@pytest.mark.parametrize("model", ["run", "run/checkpoints/step-0000003"])
def test_a_use_of_the_test_split_is_logged_in_the_run_the_model_came_from(
    model: str, tmp_path: Path
) -> None:
    (tmp_path / "run/checkpoints/step-0000003").mkdir(parents=True)
    assert log_test_use_of(str(tmp_path / model), tmp_path / "else", "score", 5) == ""
    assert '"score"' in (tmp_path / "run/test_uses.jsonl").read_text()
    assert not (tmp_path / "else").exists()


def test_a_use_of_the_test_split_by_other_weights_is_logged_beside_the_output(
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    assert log_test_use_of(str(tmp_path / "model"), tmp_path / "else", "score", 5) == ""
    assert log_test_use_of("hf:owner/name", tmp_path / "else", "score", 5) == ""
    assert (tmp_path / "else/test_uses.jsonl").read_text().count('"score"') == 2


def test_a_use_of_the_test_split_by_a_read_only_run_is_logged_beside_the_output(
    tmp_path: Path,
) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/test_uses.jsonl").mkdir()  # so that even root cannot write it
    note = log_test_use_of(str(tmp_path / "run"), tmp_path / "else", "score", 5)
    assert f"logged in {tmp_path / 'else/test_uses.jsonl'}" in note
    assert '"score"' in (tmp_path / "else/test_uses.jsonl").read_text()


def test_an_empty_folder_of_the_requested_name_is_used(tmp_path: Path) -> None:
    first = new_folder(tmp_path, "mine", "quick")
    (first / ".lock").touch()
    assert new_folder(tmp_path, "mine", "quick") == first


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that has locked the folder."""
    code = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_locked_by_one_live_process(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="in use by another run"):
        hold(tmp_path)
    holder.kill()
    holder.communicate()
    with hold(tmp_path), hold(tmp_path):  # a process may lock it twice
        pass


def test_release_undoes_any_number_of_locks(tmp_path: Path) -> None:
    held = hold(tmp_path), hold(tmp_path)
    assert lock_of(tmp_path).is_locked
    release(tmp_path)
    assert not lock_of(tmp_path).is_locked
    del held


def interrupted(words: Sequence[str]) -> int:
    raise KeyboardInterrupt


def test_ctrl_c_outside_of_training_causes_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guarded(interrupted, []) == 130
    assert capsys.readouterr().err == "vitrail: stopped\n"


def test_a_second_signal_has_the_systems_default_effect() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == stop.note
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_during_the_final_test_stops_at_once(
    copied: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.resume(*copied)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "finish", interrupted)
    assert follow(run) == 128 + signal.SIGINT
    assert f"vitrail train --resume {run.folder}" in capsys.readouterr().err.replace("\n", "")


def test_speed_is_finite_if_the_clock_stands_still(
    finished: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    (tmp_path / "run").mkdir()
    run = Run.start(finished[1], tmp_path / "run")
    for _ in run.train():
        pass
    assert run.state.seconds == 0
    assert run.rows[-1]["images_per_second"] > 0


def test_an_output_path_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "output").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(OutputError, match="cannot be created"):
        new_folder(tmp_path / "output", "", "quick")
