"""Threads with bounded queues for the server's work, and predictions that share a batch."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np

from vitrail.errors import VitrailError
from vitrail.inference.classifier import Classifier

P = ParamSpec("P")
T = TypeVar("T")
Outputs = tuple[np.ndarray, float | None]
"""Logits (Y,), and the familiarity if it is known."""


class BusyError(VitrailError):
    """The queue is full: the request may be repeated a moment later."""


class Lane:
    """Some threads that work through a queue, which refuses more than ``limit`` tasks."""

    def __init__(self, limit: int, threads: int = 1) -> None:
        self._limit, self._waiting = limit, 0
        self._pool = ThreadPoolExecutor(threads)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``work(*args, **kwargs)``, called in one of the threads.

        Raises:
            BusyError: the queue is full.
        """
        if self._waiting >= self._limit:
            raise BusyError("too many requests at once: try again in a second")
        self._waiting += 1
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, lambda: work(*args, **kwargs))
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Wait for what is running; nothing can be added."""
        self._pool.shutdown()


@dataclass(eq=False)
class _Request:
    classifier: Classifier
    raw_HWC: np.ndarray
    answer: "asyncio.Future[Outputs]"


class Batcher:
    """Predictions of pictures from several requests in one forward pass.

    A batch is whatever arrived while the last one was computed. A batch of fewer than ``enough``
    pictures waits for those that are being read, but at most ``patience`` seconds; a single client
    never waits. A larger one would gain little by waiting, and the processor would be idle.
    """

    def __init__(
        self, limit: int = 256, largest: int = 32, enough: int = 8, patience: float = 0.003
    ) -> None:
        self._limit, self._largest = limit, largest
        self._enough, self._patience = enough, patience
        self._lane, self._waiting = Lane(limit=1), list[_Request]()
        self._work: asyncio.Task[None] | None = None
        self.reading = 0
        """Pictures that will be asked for in a moment; the caller counts them."""

    async def outputs(self, classifier: Classifier, raw_HWC: np.ndarray) -> Outputs:
        """Return logits (Y,) and familiarity of one picture (H, W, C), bytes at the model's size.

        Raises:
            BusyError: too many pictures are waiting.
        """
        if len(self._waiting) >= self._limit:
            raise BusyError("too many requests at once: try again in a second")
        request = _Request(classifier, raw_HWC, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        return await request.answer

    async def _run(self) -> None:
        """Compute batches until nothing waits."""
        while self._waiting:
            if self.reading and len(self._waiting) < self._enough:
                await asyncio.sleep(self._patience)
            classifier = self._waiting[0].classifier
            batch = [each for each in self._waiting if each.classifier.model is classifier.model]
            batch = batch[: self._largest]  # none was cancelled: handlers run to their end
            self._waiting = [each for each in self._waiting if each not in batch]
            try:
                raw_BHWC = np.stack([each.raw_HWC for each in batch])
                found_BY, known_B = await self._lane.run(classifier.raw_outputs, raw_BHWC)
            except Exception as error:  # noqa: BLE001 (each request reports it)
                for each in batch:
                    each.answer.set_exception(error)
            else:
                for row, each in enumerate(batch):
                    familiarity = None if known_B is None else float(known_B[row])
                    each.answer.set_result((found_BY[row], familiarity))

    def close(self) -> None:
        """Wait for the batch that is being computed."""
        self._lane.close()
