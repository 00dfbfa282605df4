"""What commands set before torch loads: spinning threads are limited, freed memory is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitrail.cli import process
from vitrail.cli.process import (
    IDLE_SPINS,
    SHARED_SPINS,
    Load,
    limit_spinning,
    read_load,
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/stat, glibc")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process.SPIN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@linux
def test_only_others_on_the_cores_of_this_process_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9999 0 0 0 0 0 0 0 0 0\n"
        "cpu0 100 20 30 5000 70 4 3 3 0 0\n"
        "cpu1 200 0 0 5000 0 0 0 0 0 0\n"
        "cpu10 7777 0 0 0 0 0 0 0 0 0\n"
        "intr 12345 0 0\n"
    )
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(process.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(process.time, "process_time", lambda: 1.5)
    found = read_load(stat)
    assert found is not None
    assert found.others == pytest.approx(3.6 - 1.5)
    assert read_load(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("used", "spins"), [(0.0, IDLE_SPINS), (0.3, IDLE_SPINS), (0.5, SHARED_SPINS)]
)
def test_threads_spin_shorter_beside_other_programs(
    monkeypatch: pytest.MonkeyPatch, used: float, spins: int
) -> None:
    monkeypatch.setattr(process, "START", Load(10.0, 95.0))
    monkeypatch.setattr(process.time, "monotonic", lambda: 11.0)
    monkeypatch.setattr(process, "read_load", lambda: Load(11.0, 95.0 + used))
    limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == str(spins)


@pytest.mark.parametrize("name", process.SPIN_VARIABLES)
def test_the_users_own_settings_are_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(process, "START", Load(0.0, 0.0))
    monkeypatch.setenv(name, "active")
    before = dict(os.environ)
    limit_spinning()
    assert dict(os.environ) == before


@linux
@pytest.mark.parametrize(
    "call",
    [
        "from vitrail.cli import main; main(['info'])",
        "import sys; sys.argv = ['train.py', '--epochs', 'x']\n"
        "from vitrail.cli.reference import train_command; train_command()",
        "import sys; sys.argv = ['test.py', '--mode', 'custom']\n"
        "from vitrail.cli.reference import test_command; test_command()",
    ],
)
def test_the_commands_limit_it_before_torch_is_loaded(call: str, tmp_path: Path) -> None:
    code = f"""
import sys
from vitrail.cli import process
def limit(limit_spinning=process.limit_spinning):
    limit_spinning()
    print("loaded" if "torch" in sys.modules else "not loaded")
process.limit_spinning = limit
{call}
import os
print(os.environ["GOMP_SPINCOUNT"])
"""
    words = [sys.executable, "-c", code]
    said = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = said.stdout.splitlines()
    assert "not loaded" in lines, said.stderr
    assert "loaded" not in lines
    assert lines[-1] in (str(IDLE_SPINS), str(SHARED_SPINS))


def test_importing_the_library_sets_nothing_and_brings_no_pyplot_and_no_downloader() -> None:
    code = """
import os, sys
import vitrail.evaluation.report, vitrail.training.run, vitrail.weights.pretrained
print(os.environ.get("GOMP_SPINCOUNT"), {"matplotlib.pyplot", "requests"} & {*sys.modules})
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "None set()\n"


PROGRAM = """
import resource, sys
from vitrail.cli.process import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
import torch
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16, 2**18)  # 16 MiB: 4096 pages
        torch.ones(40, 2**18)  # 40 MiB: more than glibc keeps by default
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def count_faults(word: str) -> int:
    """Pages that the system had to provide for forty large tensors, one after the other."""
    command = [sys.executable, "-c", PROGRAM, word]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("the C library has no mallopt, or takes no such thresholds")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@linux
def test_large_tensors_reuse_freed_pages() -> None:
    kept = count_faults("keep")
    assert kept < 1_000
    assert count_faults("leave") > 10 * kept
