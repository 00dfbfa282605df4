"""Progress of training: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vitrail.training.loop import Update
from vitrail.training.run import EpochEnd, Run

PLAIN_SECONDS = 30.0
"""Time between two lines within an epoch, without a terminal."""
SPEED_SECONDS = 5.0
"""Training time over which the speed is averaged."""
SLOW_PERIODS = 2
"""Consecutive periods below half of the best speed, after which the display gives a reason."""
SLOW = "another program seems to be using the processor"


class SpeedMeter:
    """Images per second of training over SPEED_SECONDS, and whether the speed has dropped.

    The time for evaluation and writing between epochs does not count.
    """

    def __init__(self) -> None:
        self.last_time = time.monotonic()
        self.seconds, self.images = 0.0, 0
        self.speed = self.best = 0.0
        self.slow_periods = 0

    @property
    def is_slow(self) -> bool:
        """Whether the speed has been below half of its maximum for SLOW_PERIODS."""
        return self.slow_periods >= SLOW_PERIODS

    def skip(self) -> None:
        """Leave out the time since the last update."""
        self.last_time = time.monotonic()

    def count(self, images: int) -> None:
        """Count the images of one update."""
        now = time.monotonic()
        self.seconds, self.images = self.seconds + now - self.last_time, self.images + images
        self.last_time = now
        if self.seconds < SPEED_SECONDS and self.best:
            return
        self.speed = self.images / max(self.seconds, 1e-9)
        if self.seconds >= SPEED_SECONDS:  # before that, the first updates are a rough estimate
            self.best = max(self.best, self.speed)
            self.slow_periods = self.slow_periods + 1 if self.speed < self.best / 2 else 0
            self.seconds, self.images = 0.0, 0


class TrainingDisplay:
    """Shows the events of Run.train()."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
            transient=True,
        )
        self.task = self.progress.add_task(
            "", total=run.total_steps, completed=run.state.step, state=""
        )
        self.last_line, self.meter = time.monotonic(), SpeedMeter()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, event: Update | EpochEnd) -> None:
        """Show one event."""
        if isinstance(event, EpochEnd):
            self.console.print(self.epoch_line(event))
            self.last_line = time.monotonic()
            self.meter.skip()
        else:
            self.show_update(event)

    def show_update(self, update: Update) -> None:
        """Move the bar, or print a line every PLAIN_SECONDS."""
        now = time.monotonic()
        self.meter.count(update.images)
        loss, accuracy = self.run.state.tally.means()
        speed = f"{self.meter.speed:,.0f} images/s{self.reason()}"
        state = f"loss {loss:.3f}  accuracy {accuracy:6.2%}  {speed}"
        epoch = f"epoch {update.epoch}/{self.run.config.training.epochs}"
        self.progress.update(self.task, completed=update.step, description=epoch, state=state)
        if not self.live and now - self.last_line >= PLAIN_SECONDS:
            self.console.print(f"{epoch}  step {update.step}/{self.run.total_steps}  {state}")
            self.last_line = now

    def reason(self) -> str:
        """Return the likely reason why training on the CPU has become slow, if it has."""
        return f"  ({SLOW})" if self.meter.is_slow and self.run.device.type == "cpu" else ""

    def epoch_line(self, end: EpochEnd) -> str:
        """Return what is printed after an epoch."""
        row: Mapping[str, Any] = end.row
        parts = [f"epoch {row['epoch']:>3}/{self.run.config.training.epochs}"]
        for split in ("train", "validation", "test"):
            if f"{split}_loss" in row:
                scores = f"{row[f'{split}_loss']:.3f} {row[f'{split}_accuracy']:6.2%}"
                parts.append(f"{split} {scores}")
        parts.append(f"{row['images_per_second']:,.0f} images/s{self.reason()}")
        if end.best and "validation_loss" in row:
            parts.append("best")
        return "  ".join(parts)
