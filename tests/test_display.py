"""What one sees of a training run: a bar on a terminal, lines elsewhere, TensorBoard on demand."""

import io
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vitrine.cli import display
from vitrine.cli.display import TrainingDisplay
from vitrine.cli.signals import stop_requests
from vitrine.config import Config
from vitrine.configfile import from_json
from vitrine.errors import ConfigError
from vitrine.run import EpochEnd, Run


def watch(config: Config, folder: Path, *, terminal: bool) -> tuple[str, TrainingDisplay]:
    """Train under a display; return what it printed, and the display."""
    folder.mkdir()
    run, screen = Run.start(config, folder), io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    with TrainingDisplay(run, console) as shown:
        for event in run.train():
            shown.show(event)
    return screen.getvalue(), shown


def test_lines_where_there_is_no_terminal(
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
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    printed, _ = watch(tiny_run, tmp_path / "b", terminal=False)
    assert "update 4/9" in printed


def test_a_bar_where_there_is_one(
    tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    printed, shown = watch(tiny_run, tmp_path / "a", terminal=True)
    assert "update " not in printed
    assert "\u001b[" in printed
    (task,) = shown.progress.tasks
    assert task.completed == task.total == 9
    assert task.description == "epoch 3/3"
    assert "images/s" in task.fields["state"]


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


def test_tensorboard_that_is_not_installed_is_one_clear_error(
    tiny_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = Run.start(from_json({"run": {"tensorboard": True}}, tiny_run), tmp_path)
    with pytest.raises(ConfigError, match="tensorboard is not installed"):
        next(run.train())


def test_the_first_signal_asks_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as stop:
        assert stop.signal == 0
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
