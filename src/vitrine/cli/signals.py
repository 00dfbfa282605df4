"""Ctrl-C and SIGTERM as a request that the loop reads between two updates."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """The first signal is noted; the same signal again stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM inside the block; put the old handlers back after it."""
    request = StopRequest()
    wanted = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, request.note) for number in wanted}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
