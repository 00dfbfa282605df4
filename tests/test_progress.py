"""The display of a training run: a progress bar on a terminal, lines elsewhere, TensorBoard."""

import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vitrail.cli import progress
from vitrail.cli.progress import TrainingDisplay, stop_requests
from vitrail.config.files import from_json
from vitrail.config.settings import Config
from vitrail.training.run import EpochEnd, Run


def watch(config: Config, folder: Path, *, terminal: bool) -> tuple[str, TrainingDisplay]:
    """Train under a display; return what it printed, and the display."""
    folder.mkdir()
    run, screen = Run.start(config, folder), io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    with TrainingDisplay(run, console) as shown:
        for event in run.train():
            shown.show(event)
    return screen.getvalue(), shown


def test_lines_without_a_terminal(
    tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed, _ = watch(tiny_run, tmp_path / "a", terminal=False)
    lines = printed.splitlines()
    assert len(lines) == 3
    assert all("\u001b" not in line for line in lines)
    for number, line in enumerate(lines, 1):
        assert line.startswith(f"epoch   {number}/3  train ")
        assert "validation" in line
        assert "images/s" in line
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    printed, _ = watch(tiny_run, tmp_path / "b", terminal=False)
    assert "step 4/9" in printed


def test_a_progress_bar_on_a_terminal(
    tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    printed, shown = watch(tiny_run, tmp_path / "a", terminal=True)
    assert "step " not in printed
    assert "\u001b[" in printed
    (task,) = shown.progress.tasks
    assert task.completed == task.total == 9
    assert task.description == "epoch 3/3"
    assert "images/s" in task.fields["state"]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_time_between_epochs_does_not_count_as_training(
    tiny_run: Config, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    run, screen = Run.start(tiny_run, tmp_path), io.StringIO()
    console = Console(file=screen, force_terminal=False, width=200)
    with TrainingDisplay(run, console) as shown:
        for event in run.train():
            clock.now += 60 if isinstance(event, EpochEnd) else 0.1
            shown.show(event)
    speeds = re.findall(r"step \d+/9 .* ([\d,]+) images/s", screen.getvalue())
    assert len(speeds) == 9
    assert all(int(speed) > 100 for speed in speeds)


def test_tensorboard_has_every_number_of_every_epoch(tiny_run: Config, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "a").mkdir()
    run = Run.start(from_json({"run": {"tensorboard": True}}, tiny_run), tmp_path / "a")
    rows = [event.row for event in run.train() if isinstance(event, EpochEnd)]
    events = accumulator.EventAccumulator(str(tmp_path / "a/tensorboard"))
    events.Reload()
    for name in set(rows[0]) - {"epoch", "step"}:
        written = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        assert written == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in rows], name


def test_the_first_signal_requests_a_stop_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as stop:
        assert stop.signal == 0
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    program = (
        "import signal\n"
        "from vitrail.cli.progress import stop_requests\n"
        "with stop_requests() as stop:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('noted', stop.signal == signal.SIGINT, flush=True)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('survived', flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["noted", "True"]
    assert done.returncode != 0


def test_a_signal_that_torchrun_forwards_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends Ctrl-C to all processes, and torchrun sends it to the ranks once more."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(progress.distributed, "count", lambda: 2)
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
