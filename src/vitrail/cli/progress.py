"""Follow a training run: its progress on the terminal, and Ctrl-C as a request to stop."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vitrail.runtime import distributed
from vitrail.training.loop import Update
from vitrail.training.run import EpochEnd, Run

PLAIN_SECONDS = 30.0
"""Time between two printed lines within an epoch, if there is no terminal."""


class StopRequest:
    """Remembers the first signal; the same signal again stops the process at once.

    Not so under torchrun, which forwards the Ctrl-C that the terminal sends to all processes, so
    that each gets it twice; torchrun itself kills those that do not stop in time.
    """

    signal = 0

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        # The default handler ends the process even inside a long call of torch.
        signal.signal(number, signal.SIG_IGN if distributed.count() > 1 else signal.SIG_DFL)
        self.signal = self.signal or number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Remember SIGINT and SIGTERM inside the block; restore the old handlers after it."""
    request = StopRequest()
    old = {
        number: signal.signal(number, request.note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class TrainingDisplay:
    """Shows the events of Run.train(): a live bar on a terminal, plain lines elsewhere."""

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
        self.images, self.epoch_start = 0, time.monotonic()
        self.last_line = self.epoch_start

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, event: Update | EpochEnd) -> None:
        """Show one event."""
        if isinstance(event, EpochEnd):
            self.console.print(self.epoch_line(event))
            self.images, self.epoch_start = 0, time.monotonic()
            self.last_line = self.epoch_start
        else:
            self.show_update(event)

    def show_update(self, update: Update) -> None:
        """Move the bar, or print a line every PLAIN_SECONDS."""
        now = time.monotonic()
        self.images += update.images
        loss, accuracy = self.run.state.tally.means()
        speed = self.images / max(now - self.epoch_start, 1e-9)
        state = f"loss {loss:.3f}  accuracy {accuracy:6.2%}  {speed:,.0f} images/s"
        epoch = f"epoch {update.epoch}/{self.run.config.training.epochs}"
        self.progress.update(self.task, completed=update.step, description=epoch, state=state)
        if not self.live and now - self.last_line >= PLAIN_SECONDS:
            self.console.print(f"{epoch}  step {update.step}/{self.run.total_steps}  {state}")
            self.last_line = now

    def epoch_line(self, end: EpochEnd) -> str:
        """Return what is printed after an epoch."""
        row = dict(end.row)
        parts = [f"epoch {row['epoch']:>3}/{self.run.config.training.epochs}"]
        for split in ("train", "validation", "test"):
            if f"{split}_loss" in row:
                parts.append(f"{split} {row[f'{split}_loss']:.3f} {row[f'{split}_accuracy']:6.2%}")
        parts.append(f"{row['images_per_second']:,.0f} images/s")
        if end.best and "validation_loss" in row:
            parts.append("best")
        return "  ".join(parts)
