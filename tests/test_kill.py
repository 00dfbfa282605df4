"""A run in a process of its own: killed and gone on with, or asked to stop."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vitrine.checkpoint import load_training, load_weights, read_pointer

WORDS = shlex.split(
    "--preset quick --device cpu --patch_size 8 --embed_dim 16 --n_attention_heads 2 --n_layers 1 "
    "--batch_size 30 --num_train_images 600 --num_test_images 30 --validation_images 50 "
    "--randaugment_ops 1 --dropout 0.1 --ema_decay 0.9 --epochs 3"
)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start training in a process."""
    command = [sys.executable, "-m", "vitrine", "train", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(condition: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file is there."""
    for _ in range(6000):
        if condition.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"{condition} never came")


def final(folder: Path) -> dict[str, torch.Tensor]:
    last = read_pointer(folder / "checkpoints", "LAST")
    return {**load_weights(last), **load_training(last)}


def curve(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_killed_in_mid_epoch_and_gone_on_with_is_never_killed(tmp_path: Path) -> None:
    whole = start(tmp_path, *WORDS, "--folder_name", "whole")
    killed = start(tmp_path, *WORDS, "--folder_name", "killed")
    wait_for(tmp_path / "output/killed/checkpoints/step-0000020", killed)
    time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "output/killed/result.json").exists()
    second = start(tmp_path, "--resume", "output/killed")
    errors = second.communicate()[1]
    assert second.returncode == 0, errors
    assert "going on after update" in errors
    errors = whole.communicate()[1]
    assert whole.returncode == 0, errors
    one, other = (final(tmp_path / "output" / name) for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert curve(tmp_path / "output/whole") == curve(tmp_path / "output/killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = start(tmp_path, *WORDS, "--epochs", "400")
    wait_for(tmp_path / "output/quick/checkpoints/LAST", process)
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "vitrine train --resume output/quick" in errors
    assert "Traceback" not in errors
    assert out == ""
    assert read_pointer(tmp_path / "output/quick/checkpoints", "LAST").is_dir()
