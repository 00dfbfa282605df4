"""Ctrl-C and SIGTERM as a request that the loop reads between two updates."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A request to stop, where it is to be followed at once.

    No Exception, as KeyboardInterrupt is none: nobody shall take it for a fault.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class StopRequest:
    """The first signal is noted; the same signal again stops at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.raises = False

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        # From now on the system's own: it ends the process even inside a long call of torch.
        signal.signal(number, signal.SIG_DFL)
        self.signal = self.signal or number
        if self.raises:
            raise Stopped(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal, also one noted before, leave the block as the exception Stopped."""
        self.raises = True
        try:
            if self.signal:
                raise Stopped(self.signal)
            yield
        finally:
            self.raises = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM inside the block; put the old handlers back after it.

    Python delivers signals to the main thread only: in any other one there is nothing to note.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, request.note) for number in wanted}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
