"""torchrun itself: a killed process, restarts, resuming with another number of processes."""

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

from vitrail.config.files import read_json
from vitrail.weights.checkpoint import load_training, load_weights, read_pointer, step_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks by /proc"),
]
WORDS = shlex.split(
    "--preset quick --device cpu --patch_size 8 --embed_dim 16 --n_attention_heads 2 "
    "--n_layers 1 "
    "--dataset cifar10 --validation_images 7 --batch_size 11 --randaugment_ops 1 --ema_decay 0.9 "
    "--optimizer adamw --learning_rate 2e-4 --epochs 30 --precision float32"
)
"""53 images of noise to train on: five updates an epoch, the last of 9 images."""
EPOCHS, STEPS = 30, 5


def start(folder: Path, *WORDS: str, processes: int = 2, restarts: int = 0) -> subprocess.Popen:
    """Start ``vitrail train`` with N processes; their output goes to FOLDER/output.txt."""
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--max-restarts", str(restarts), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "vitrail", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("ab") as said:
        return subprocess.Popen(
            [*command, *WORDS], cwd=folder, env=environment, stdout=said, stderr=said
        )


def output_of(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until a file exists."""
    for _ in range(60_000):
        if path.exists():
            return
        assert process.poll() is None, output_of(path.parents[3])
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def finish(process: subprocess.Popen, folder: Path) -> None:
    assert process.wait() == 0, output_of(folder)


def rank_of(torchrun: subprocess.Popen, rank: int) -> int:
    """Return the process id of a rank."""
    for children in Path(f"/proc/{torchrun.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment:
                return int(pid)
    raise AssertionError(f"rank {rank} is not there")


def final(folder: Path) -> dict[str, torch.Tensor]:
    last = read_pointer(folder / "checkpoints", "LAST")
    return {**load_weights(last), **load_training(last)}


def curve(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_killed_process_ends_the_job_with_a_clear_error(
    tmp_path: Path, cifar_folder: Path
) -> None:
    job = start(tmp_path, *WORDS, "--epochs", "4000")
    wait_for(tmp_path / "output/quick/checkpoints/LAST", job)
    os.kill(rank_of(job, 1), signal.SIGKILL)
    assert job.wait() == 1
    assert "vitrail: process 0 lost contact with another process" in output_of(tmp_path)
    assert "checkpoint with --resume RUN_FOLDER" in output_of(tmp_path)
    assert "Signal 9 (SIGKILL)" in output_of(tmp_path)  # torchrun names the killed process
    assert not (tmp_path / "output/quick/result.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_restarted_job_resumes_from_the_last_checkpoint(
    tmp_path: Path, cifar_folder: Path, rank: int
) -> None:
    (tmp_path / "undisturbed").mkdir()
    finish(
        start(tmp_path / "undisturbed", *WORDS, "--data_path", "../data"), tmp_path / "undisturbed"
    )
    job = start(tmp_path, *WORDS, restarts=1)
    wait_for(tmp_path / "output/quick/checkpoints/LAST", job)
    os.kill(rank_of(job, rank), signal.SIGKILL)
    finish(job, tmp_path)
    assert "resuming at step" in output_of(tmp_path)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["quick"]
    undisturbed, killed = tmp_path / "undisturbed/output/quick", tmp_path / "output/quick"
    assert curve(undisturbed) == curve(killed)
    assert len(curve(undisturbed)) == EPOCHS
    wanted = final(undisturbed)
    for name, tensor in final(killed).items():
        assert torch.equal(tensor, wanted[name]), name


def test_a_run_resumes_with_another_number_of_processes(tmp_path: Path, cifar_folder: Path) -> None:
    # Batch norm sees only a rank's share, so such models differ by more (many-machines.md).
    words = [*WORDS, "--stem", "patch"]
    (tmp_path / "alone").mkdir()
    alone = start(tmp_path / "alone", *words, "--data_path", "../data", processes=1)
    finish(alone, tmp_path / "alone")
    checkpoints = tmp_path / "output/quick/checkpoints"
    two = start(tmp_path, *words)
    wait_for(checkpoints / "LAST", two)
    two.send_signal(signal.SIGTERM)
    assert two.wait() != 0
    assert "resume with: vitrail train --resume output/quick" in output_of(tmp_path)
    stopped = step_of(read_pointer(checkpoints, "LAST"))
    assert stopped < EPOCHS * STEPS
    one = start(tmp_path, "--resume", "output/quick", processes=1)
    while step_of(read_pointer(checkpoints, "LAST")) == stopped:
        assert one.poll() is None, output_of(tmp_path)
        time.sleep(0.01)
    one.send_signal(signal.SIGTERM)
    assert one.wait() == 143, output_of(tmp_path)
    finish(start(tmp_path, "--resume", "output/quick"), tmp_path)
    wanted = final(tmp_path / "alone/output/quick")
    for name, tensor in final(tmp_path / "output/quick").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=2e-5, msg=name)
    rows = zip(
        curve(tmp_path / "output/quick"), curve(tmp_path / "alone/output/quick"), strict=True
    )
    for row, wanted_row in rows:
        assert row["epoch"] == wanted_row["epoch"]
        assert row["train_loss"] == pytest.approx(wanted_row["train_loss"], rel=1e-5)


def test_the_quick_preset_learns_as_well_with_two_processes(tmp_path: Path) -> None:
    finish(start(tmp_path, "--preset", "quick", "--device", "cpu"), tmp_path)
    result = read_json(tmp_path / "output/quick/result.json")
    assert result["test"]["images"] == 2000
    assert result["test"]["accuracy"] > 0.98  # one process: 0.990 with a spread of 0.005
