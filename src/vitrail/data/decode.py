"""Many picture files -> one tensor of bytes, in parallel, hardly larger in memory than its result.

The pixels of a file depend on neither the number of threads nor the order of the files; only the
range of wide gray pictures (see ``choose_range``) is common to all of them.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vitrail.data.formats import read_pixels
from vitrail.data.framing import Fit, enough_side, fit_channels
from vitrail.data.pictures import (
    Extent,
    PixelRange,
    choose_range,
    describe,
    gray_to_rgb,
    join,
    measure,
    to_bytes,
)
from vitrail.errors import DataError, PictureError

log = logging.getLogger("vitrail")


@dataclass(frozen=True)
class Decoded:
    """The readable pictures of a list of files.

    Shapes:
        raw_BCHW: uint8, contiguous, in the order of the files.
    """

    raw_BCHW: Tensor
    sound: tuple[int, ...]
    """The file of each image, as an index into the list."""
    broken: tuple[tuple[Path, str], ...]
    """The files that cannot be read, each with the reason."""
    pixel_range: PixelRange | None
    """The values of black and white in wide gray pictures; None if there are no such pictures."""


@dataclass
class Job:
    """What the threads share: each writes to slots of its own."""

    paths: Sequence[Path]
    slots_BCHW: np.ndarray
    fit: Fit
    pixel_range: PixelRange | None
    reasons: dict[int, str] = field(default_factory=dict)
    waiting: dict[int, Extent] = field(default_factory=dict)
    """The wide pictures that were read before there was a range: their slots are empty."""
    met_wide: bool = False

    def decode_one(self, index: int) -> None:
        """Decode a picture into its slot; of a wide one only the extent while there is no range."""
        n_channels, *size = self.slots_BCHW.shape[1:]
        size_hw = size[0], size[1]
        try:
            pixels = read_pixels(self.paths[index], shorter_side=enough_side(size_hw, self.fit))
        except PictureError as error:
            self.reasons[index] = str(error)
            return
        if pixels.ndim == 2:
            self.met_wide = True
            if self.pixel_range is None:
                self.waiting[index] = measure(pixels)
                return
            pixels = gray_to_rgb(to_bytes(pixels, self.pixel_range))
        raw_HWC = fit_channels(pixels, size_hw, self.fit, n_channels)
        self.slots_BCHW[index] = raw_HWC.transpose(2, 0, 1)


def decode(
    paths: Sequence[Path],
    *,
    size_hw: tuple[int, int],
    fit: Fit,
    num_workers: int,
    n_channels: int = 3,
    pixel_range: PixelRange | None = None,
) -> Decoded:
    """Decode picture files at one size, each once (wide gray ones twice, if no range is given).

    Args:
        paths: the files.
        size_hw: height and width in pixels of the result.
        fit: how a picture of another shape is made to fit.
        num_workers: threads, each with one picture in memory.
        n_channels: 3 for RGB, 1 for gray.
        pixel_range: the values of black and white in wide gray pictures. Default: chosen from the
            lowest and highest value of all of them, and logged.

    Raises:
        DataError: the pictures do not fit in memory.
    """
    raw_BCHW = allocate((len(paths), n_channels, *size_hw))
    job = Job(paths, raw_BCHW.numpy(), fit, pixel_range)
    run_threads(job.decode_one, range(len(paths)), num_workers, "decoding")
    if job.waiting:
        extent = join(job.waiting.values())
        job.pixel_range = choose_range(extent)
        chosen = describe(extent, job.pixel_range)
        log.warning("wide gray pictures: %d files, %s", len(job.waiting), chosen)
        run_threads(job.decode_one, sorted(job.waiting), num_workers, "decoding wide gray pictures")
    sound = [index for index in range(len(paths)) if index not in job.reasons]
    for target, index in enumerate(sound):  # in place: there is no second copy
        if target != index:
            raw_BCHW[target] = raw_BCHW[index]
    return Decoded(
        raw_BCHW[: len(sound)],
        tuple(sound),
        tuple((paths[index], reason) for index, reason in sorted(job.reasons.items())),
        job.pixel_range if job.met_wide else None,
    )


def allocate(shape: tuple[int, ...]) -> Tensor:
    """Return an empty tensor of bytes, or refuse with its size where memory is too small."""
    try:
        return torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        gigabytes = float(np.prod(shape, dtype=float)) / 1e9
        raise DataError(
            f"{shape[0]:,} pictures of {shape[2]} x {shape[3]} pixels need {gigabytes:,.1f} GB of "
            "memory, which is not available: give a smaller image_size or fewer pictures"
        ) from error


def run_threads(
    work: Callable[[int], None], indices: Sequence[int], num_workers: int, title: str
) -> None:
    """Call ``work`` with each index, in threads, showing progress on a terminal.

    Each thread takes the next index when it is done with one, so that no more pictures are in
    memory than there are threads. An exception, Ctrl-C too, stops all of them.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    for index in indices:
        waiting.put(index)
    silent = sys.stderr is None or not sys.stderr.isatty()

    with (
        Progress(console=Console(stderr=True), disable=silent) as progress,
        ThreadPoolExecutor(max(1, num_workers)) as pool,
    ):
        task = progress.add_task(title, total=len(indices))

        def take_all() -> None:
            while (index := next_of(waiting)) is not None:
                work(index)
                progress.advance(task)

        try:
            for future in [pool.submit(take_all) for _ in range(max(1, num_workers))]:
                future.result()
        finally:
            while next_of(waiting) is not None:
                pass


def next_of(queue: "SimpleQueue[int]") -> int | None:
    """Return the next index, None at the end."""
    try:
        return queue.get_nowait()
    except Empty:
        return None
