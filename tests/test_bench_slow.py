"""The complete benchmark with the real peers, and a dry run of the GPU records."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from speed.jobs import PEERS_FOR, TITLES

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--device cpu --embed_dim 16 --n_layers 2 --batch_size 8 --rounds 1 --quick".split()  # noqa: SIM905

Runner = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def bench() -> Runner:
    """Run benchmarks/bench.py in a process of its own."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "benchmarks/bench.py", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_all_workloads_with_the_peers(bench: Runner) -> None:
    peers = os.environ.get("VITRAIL_PEERS")
    if not peers:
        pytest.skip("VITRAIL_PEERS names no environment of benchmarks/peers.sh")
    done = bench(
        *SMALL,
        "--precision",
        "float32",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for workload in ("step", "inference", "explanation"):
        systems = {row["system"] for row in result["rows"] if row["workload"] == workload}
        assert systems == {"vitrail", *PEERS_FOR[workload]}, result["remarks"]
    for row in result["rows"]:
        if "largest_difference" in row["about"]:
            assert row["about"]["largest_difference"] < 1e-3
            assert row["about"]["mean_confidence"] > 0.3


@pytest.mark.slow
def test_growth_is_drawn(bench: Runner, tmp_path: Path) -> None:
    done = bench(*SMALL, "--growth", "--plot", tmp_path / "growth.png")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    work = {(p["axis"], p["series"], p["value"]): p["work_mib"] for p in result["points"]}
    assert work["tokens", "attention", 256] > work["tokens", "inference", 256]
    assert (tmp_path / "growth.png").is_file()


@pytest.mark.slow
def test_dry_run_of_the_gpu_records(tmp_path: Path) -> None:
    script = ROOT / "benchmarks/gpu_records.sh"
    done = subprocess.run(
        ["bash", script, "--dry_run", "--output", tmp_path], capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = (tmp_path / "record/table.md").read_text()
    for name in ("reference", "reference12", "base", "strongest", "to-94-in-240", "to-94-in-120"):
        assert f"| {name} |" in table
    for name in ("reference", "small", "base", "vit-s4"):
        rows = json.loads((tmp_path / f"bench-{name}.json").read_text())["rows"]
        assert {"step", "epoch"} <= {row["workload"] for row in rows} <= set(TITLES)
