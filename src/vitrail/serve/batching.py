"""Threads with bounded queues for the server's work, and predictions that share a batch."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch

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
        # Explicit: new threads would inherit the number of threads that a batch has set.
        self._pool = ThreadPoolExecutor(
            threads, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        )

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


def _size(count: int) -> int:
    """Return the largest power of 2 up to ``count``.

    Memory stays allocated for every batch size that has occurred: few sizes need less of it.
    """
    return 1 << (count.bit_length() - 1)


class Batcher:
    """Predictions of pictures from several requests in one forward pass.

    On a CPU, waiting pictures are split into at most as many batches as there are cores, and the
    cores are divided among the batches: a single picture uses all cores, and with many pictures
    each batch uses one. Batches never wait for one another. If fewer than ``enough`` pictures are
    waiting, they wait for those that are being read, at most ``patience`` seconds; a single client
    never waits.
    """

    def __init__(
        self,
        limit: int = 256,
        largest: int = 16,
        enough: int = 8,
        patience: float = 0.001,
        cores: int | None = None,
    ) -> None:
        self._limit, self._largest = limit, largest
        self._enough, self._patience = enough, patience
        self._cores = cores or torch.get_num_threads()
        self._lane, self._waiting = Lane(limit=self._cores, threads=self._cores), list[_Request]()
        self._starting: asyncio.Task[None] | None = None
        self._running = set[asyncio.Task[None]]()
        self.reading = 0
        """Number of pictures that are being read and will be queued soon; set by the caller."""

    async def outputs(self, classifier: Classifier, raw_HWC: np.ndarray) -> Outputs:
        """Return logits (Y,) and familiarity of one picture (H, W, C), uint8, at the model's size.

        Raises:
            BusyError: too many pictures are waiting.
        """
        if len(self._waiting) >= self._limit:
            raise BusyError("too many requests at once: try again in a second")
        request = _Request(classifier, raw_HWC, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start())
        return await request.answer

    async def _start(self) -> None:
        """Start batches until nothing waits."""
        while self._waiting:
            classifier = self._waiting[0].classifier
            most = self._cores if classifier.device.type == "cpu" else 1
            while len(self._running) >= most:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            if self.reading and len(self._waiting) < self._enough:
                await asyncio.sleep(self._patience)
            batch = [each for each in self._waiting if each.classifier.model is classifier.model]
            parts = most - len(self._running)
            batch = batch[: _size(min(self._largest, -(-len(batch) // parts)))]
            # None was cancelled: handlers run to their end.
            self._waiting = [each for each in self._waiting if each not in batch]
            others = len(self._running) + -(-len(self._waiting) // len(batch))
            cores = max(1, self._cores // (1 + others))
            running = asyncio.create_task(self._compute(batch, cores))
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _compute(self, batch: Sequence[_Request], cores: int) -> None:
        classifier = batch[0].classifier

        def forward() -> tuple[np.ndarray, np.ndarray | None]:
            torch.set_num_threads(cores)
            return classifier.raw_outputs(np.stack([each.raw_HWC for each in batch]))

        try:
            found_BY, known_B = await self._lane.run(forward)
        except Exception as error:  # noqa: BLE001 (each request reports it)
            for each in batch:
                each.answer.set_exception(error)
        else:
            for row, each in enumerate(batch):
                familiarity = None if known_B is None else float(known_B[row])
                each.answer.set_result((found_BY[row], familiarity))

    def close(self) -> None:
        """Wait for the batches that are being computed."""
        self._lane.close()
