"""Training as one sees it: a live bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vitrine.run import EpochEnd, Run
from vitrine.training.loop import Update

PLAIN_SECONDS = 30.0
"""Time between two lines inside an epoch, where there is no terminal."""
SPEED_SECONDS = 5.0
"""Time over which the speed shown is averaged."""


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
        self.last_line = self.marked_time = time.monotonic()
        self.marked_images, self.speed = 0, 0.0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def show(self, event: Update | EpochEnd) -> None:
        """Show one event."""
        if isinstance(event, EpochEnd):
            self.console.print(self.epoch_line(event))
            self.last_line = self.marked_time = time.monotonic()
            self.marked_images = 0
        else:
            self.show_update(event)

    def show_update(self, update: Update) -> None:
        """Move the bar, or print a line now and then."""
        now = time.monotonic()
        self.marked_images += update.images
        if now - self.marked_time >= SPEED_SECONDS or not self.speed:
            self.speed = self.marked_images / max(now - self.marked_time, 1e-9)
            self.marked_time, self.marked_images = now, 0
        loss, accuracy = self.run.state.tally.means()
        state = f"loss {loss:.3f}  accuracy {accuracy:6.2%}  {self.speed:,.0f} images/s"
        epoch = f"epoch {update.epoch}/{self.run.config.training.epochs}"
        self.progress.update(self.task, completed=update.step, description=epoch, state=state)
        if not self.live and now - self.last_line >= PLAIN_SECONDS:
            self.console.print(f"{epoch}  update {update.step}/{self.run.total_steps}  {state}")
            self.last_line = now

    def epoch_line(self, end: EpochEnd) -> str:
        """Return what is printed after an epoch."""
        row: dict[str, Any] = end.row
        parts = [f"epoch {row['epoch']:>3}/{self.run.config.training.epochs}"]
        for split in ("train", "validation", "test"):
            if f"{split}_loss" in row:
                scores = f"{row[f'{split}_loss']:.3f} {row[f'{split}_accuracy']:6.2%}"
                parts.append(f"{split} {scores}")
        parts.append(f"{row['images_per_second']:,.0f} images/s")
        if end.best and "validation_loss" in row:
            parts.append("best")
        return "  ".join(parts)
