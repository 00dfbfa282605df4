"""The picture files that a manifest lists -> images in memory, decoded in parallel.

The pixels of a file depend on neither the number of threads nor the order of the files; only the
range of wide gray pictures (see ``pictures.choose_range``) is common to all of them.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vitrail.config.settings import DataConfig, Split
from vitrail.data.formats import read_pixels
from vitrail.data.framing import Fit, enough_side, fit_channels, framing
from vitrail.data.images import ImageSet
from vitrail.data.manifest import Manifest
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

NAMED = 5
"""Broken files that are named in the log; the manifest lists all of them."""


class LoadedFolder(NamedTuple):
    """A split of a folder, and what was found while decoding it."""

    images: ImageSet
    broken: tuple[Path, ...]
    """Files that could not be decoded."""
    pixel_range: PixelRange | None


def load_folder(
    manifest: Manifest,
    split: Split,
    config: DataConfig,
    *,
    image_hw: tuple[int, int] = (32, 32),
    n_channels: int = 3,
) -> LoadedFolder:
    """Decode the pictures of a split, each once, in parallel.

    A file that cannot be decoded is logged and left out.

    Raises:
        DataError: no picture of the split, or none of a training class, can be decoded.
    """
    paths = manifest.paths(split)
    decoded = decode(
        paths,
        size_hw=image_hw,
        fit=framing(config),
        num_workers=config.num_workers,
        n_channels=n_channels,
        pixel_range=config.pixel_range,
    )
    for path, reason in decoded.broken[:NAMED]:
        log.warning("left out: %s", reason if str(path) in reason else f"{path}: {reason}")
    if decoded.broken:
        log.warning("%d of %d %s pictures left out: they cannot be decoded",
                    len(decoded.broken), len(paths), split)  # fmt: skip
    if paths and not decoded.valid:
        raise DataError(f"{manifest.root}: no picture of the {split} split can be decoded")
    all_labels = manifest.labels(split)
    labels = [all_labels[index] for index in decoded.valid]
    lost = set(all_labels) - set(labels)
    if split == "train" and lost:
        raise DataError(
            f"{manifest.root}: none of the training pictures of class "
            f"{manifest.classes[min(lost)]!r} can be decoded: repair them, or remove the folder"
        )
    images = ImageSet(decoded.raw_BCHW, torch.tensor(labels, dtype=torch.int64), manifest.classes)
    broken = tuple(path for path, _ in decoded.broken)
    return LoadedFolder(images, broken, decoded.pixel_range)


@dataclass(frozen=True)
class Decoded:
    """The valid pictures of a list of files.

    Shapes:
        raw_BCHW: uint8, contiguous, in the order of the files.
    """

    raw_BCHW: Tensor
    valid: tuple[int, ...]
    """The file of each image, as an index into the list."""
    broken: tuple[tuple[Path, str], ...]
    """The files that cannot be decoded, each with the reason."""
    pixel_range: PixelRange | None
    """The values of black and white in wide gray pictures; None if there are no such pictures."""


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
        size_hw: height and width of the result in pixels.
        fit: how a picture of another shape is fitted.
        num_workers: number of threads; each holds one picture in memory.
        n_channels: 3 for RGB, 1 for gray.
        pixel_range: the values of black and white in wide gray pictures. Default: inferred from
            the lowest and highest value of all of them, and logged.

    Raises:
        DataError: the pictures do not fit in memory.
    """
    raw_BCHW = _allocate((len(paths), n_channels, *size_hw))
    job = _Job(paths, raw_BCHW.numpy(), fit, pixel_range)
    _run_threads(job.decode_one, range(len(paths)), num_workers, "decoding")
    if job.waiting:
        extent = join(job.waiting.values())
        job.pixel_range = choose_range(extent)
        chosen = describe(extent, job.pixel_range)
        log.warning("wide gray pictures: %d files, %s", len(job.waiting), chosen)
        waiting = sorted(job.waiting)
        _run_threads(job.decode_one, waiting, num_workers, "decoding wide gray pictures")
    valid = [index for index in range(len(paths)) if index not in job.reasons]
    for target, index in enumerate(valid):  # in place, to avoid a second copy
        if target != index:
            raw_BCHW[target] = raw_BCHW[index]
    return Decoded(
        raw_BCHW[: len(valid)],
        tuple(valid),
        tuple((paths[index], reason) for index, reason in sorted(job.reasons.items())),
        job.pixel_range if job.met_wide else None,
    )


@dataclass
class _Job:
    """What the threads of ``decode`` share: each writes to its own slots."""

    paths: Sequence[Path]
    slots_BCHW: np.ndarray
    fit: Fit
    pixel_range: PixelRange | None
    reasons: dict[int, str] = field(default_factory=dict)
    waiting: dict[int, Extent] = field(default_factory=dict)
    """The wide pictures that were read before the range was known: their slots are empty."""
    met_wide: bool = False

    def decode_one(self, index: int) -> None:
        """Decode a picture into its slot; measure a wide one as long as the range is unknown."""
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


def _allocate(shape: tuple[int, ...]) -> Tensor:
    """Return an empty tensor of bytes, or report its size if memory is too small."""
    try:
        return torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        gigabytes = float(np.prod(shape, dtype=float)) / 1e9
        raise DataError(
            f"{shape[0]:,} pictures of {shape[2]} x {shape[3]} pixels need {gigabytes:,.1f} GB of "
            "memory, which is not available: give a smaller image_size or fewer pictures"
        ) from error


def _run_threads(
    work: Callable[[int], None], indices: Sequence[int], num_workers: int, title: str
) -> None:
    """Call ``work`` with each index, in threads, showing progress on a terminal.

    Each thread takes the next index when it has finished one, so that no more pictures are in
    memory than there are threads. An exception or Ctrl-C stops all of them.
    """
    waiting = deque(indices)
    silent = sys.stderr is None or not sys.stderr.isatty()

    with (
        Progress(console=Console(stderr=True), disable=silent) as progress,
        ThreadPoolExecutor(max(1, num_workers)) as pool,
    ):
        task = progress.add_task(title, total=len(indices))

        def take_all() -> None:
            while True:
                try:
                    index = waiting.popleft()
                except IndexError:
                    return
                work(index)
                progress.advance(task)

        try:
            for future in [pool.submit(take_all) for _ in range(max(1, num_workers))]:
                future.result()
        finally:
            waiting.clear()
