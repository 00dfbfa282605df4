"""Ctrl-C and SIGTERM as a request that the training loop reads between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A request to stop at once.

    Not an Exception, like KeyboardInterrupt, so that no handler of errors catches it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class StopRequest:
    """Remembers the first signal; the same signal again stops the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.raises = False

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        # The default handler ends the process even inside a long call of torch.
        signal.signal(number, signal.SIG_DFL)
        self.signal = self.signal or number
        if self.raises:
            raise Stopped(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Stopped in the block at a signal, also at one that arrived before it."""
        self.raises = True
        try:
            if self.signal:
                raise Stopped(self.signal)
            yield
        finally:
            self.raises = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Remember SIGINT and SIGTERM inside the block; restore the old handlers after it.

    Python delivers signals to the main thread only: other threads never see one.
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
