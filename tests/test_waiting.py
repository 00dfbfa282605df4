"""How OpenMP's threads wait: bounded, shorter beside other programs, as the user says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitrail.cli import waiting
from vitrail.runtime.waiting import ALONE, SHARED, Reading, choose_waiting, others, read_processor

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in waiting.CHOSEN:
        monkeypatch.delenv(name, raising=False)


@linux
def test_only_the_cores_of_this_process_count(
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
    monkeypatch.setattr(waiting.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(waiting.os, "sysconf", lambda _: 100)
    found = read_processor(stat)
    assert found is not None
    assert found.total == pytest.approx(3.6)
    assert read_processor(tmp_path / "none") is None


def test_this_process_does_not_count_as_another() -> None:
    before, now = Reading(10.0, 2.0, 100.0), Reading(10.2, 2.15, 100.32)
    assert others(before, now) == pytest.approx(0.85)


@pytest.mark.parametrize(("used", "spins"), [(0.0, ALONE), (0.3, ALONE), (0.5, SHARED)])
def test_threads_spin_shorter_beside_other_programs(
    monkeypatch: pytest.MonkeyPatch, used: float, spins: int
) -> None:
    monkeypatch.setattr(waiting.time, "monotonic", lambda: 11.0)
    monkeypatch.setattr(waiting, "read_processor", lambda: Reading(11.0, 5.5, 100.5 + used))
    choose_waiting(Reading(10.0, 5.0, 100.0))
    assert os.environ["GOMP_SPINCOUNT"] == str(spins)


@pytest.mark.parametrize("name", waiting.CHOSEN)
def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "active")
    before = dict(os.environ)
    choose_waiting(Reading(0.0, 0.0, 0.0))
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
def test_the_commands_choose_before_torch_is_loaded(call: str, tmp_path: Path) -> None:
    code = f"""
import sys
from vitrail.cli import waiting
def choose(before, chosen=waiting.choose_waiting):
    chosen(before)
    print("loaded" if "torch" in sys.modules else "not loaded")
waiting.choose_waiting = choose
{call}
import os
print(os.environ["GOMP_SPINCOUNT"])
"""
    words = [sys.executable, "-c", code]
    said = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = said.stdout.splitlines()
    assert "not loaded" in lines, said.stderr
    assert "loaded" not in lines
    assert lines[-1] in (str(ALONE), str(SHARED))


def test_importing_the_library_chooses_nothing() -> None:
    code = "import os, vitrail, vitrail.training.run; print(os.environ.get('GOMP_SPINCOUNT'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "None\n"
