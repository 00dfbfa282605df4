"""A run in a process of its own, asked to stop. What faults do to it: see test_faults.py."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from vitrine.checkpoint import read_pointer

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


def test_asked_to_stop_it_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(tmp_path, *WORDS, "--epochs", "400")
    wait_for(tmp_path / "output/quick/checkpoints/LAST", process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "vitrine train --resume output/quick" in errors
    assert "Traceback" not in errors
    assert out == ""
    assert read_pointer(tmp_path / "output/quick/checkpoints", "LAST").is_dir()
