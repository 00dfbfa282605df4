"""Settings and the names of splits -> images in memory, for every dataset.

The pictures of a folder are decoded in parallel; their pixels depend on neither the number of
threads nor the order of the files.
"""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from vitrail.config.settings import ARRAYS, DataConfig, Split
from vitrail.data import formats
from vitrail.data.arrays import (
    Items,
    channels_last,
    choose_items,
    find_classes,
    is_wide,
    to_bytes,
)
from vitrail.data.cifar import Name, load_cifar
from vitrail.data.formats import Extent, PixelRange, Source
from vitrail.data.images import ImageSet
from vitrail.data.manifest import File, Manifest, scan
from vitrail.data.pictures import Fit, enough_side, fit_channels, framing
from vitrail.data.shapes import load_shapes
from vitrail.data.shortcut import add_shortcut
from vitrail.data.sources import open_source
from vitrail.errors import DataError, PictureError

log = logging.getLogger("vitrail")

NAMED = 5
"""Number of broken files named in the log; the manifest lists all of them."""
DECODING = 1.3
"""Peak memory while pictures are decoded, as a multiple of their decoded bytes."""
GIB = 2**30
BLOCK = 16
"""Number of pictures that a thread decodes at a time."""
MEMORY, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Loaded:
    """Splits in memory, and what was found while reading them."""

    images: dict[Split, ImageSet]
    manifest: Manifest | None = None
    """For a folder: its files, without those that could not be decoded."""
    pixel_range: PixelRange | None = None
    """For 16-bit or floating-point pictures: their values of black and white."""


def load_data(
    config: DataConfig,
    splits: Sequence[Split],
    *,
    image_hw: tuple[int, int] = (32, 32),
    n_channels: int = 3,
    manifest: Manifest | None = None,
    classes: Sequence[str] = (),
) -> Loaded:
    """Load splits at the model's size, in color (3 channels) or gray (1).

    Validation is split off the training images, always the same ones; it may be empty. The test
    split is opened only if it is among ``splits``. For a folder, the files that the manifest lists
    are loaded. ``classes`` are those of a model to evaluate, which the labels must match.

    Raises:
        DataError: the dataset is missing, corrupt, or would run code.
        ConfigError: more validation images are requested than there are.
    """
    if config.dataset == "folder":
        manifest = manifest or scan(config.data_path, config.validation_images)
        loaded = _load_folder(config, splits, manifest, image_hw, n_channels)
    elif config.dataset in ARRAYS:
        loaded = _load_arrays(config, splits, image_hw, n_channels, classes)
    else:
        loaded = Loaded(_load_packaged(config, splits, image_hw))
    images = {split: loaded.images[split].with_channels(n_channels) for split in splits}
    if "train" in images and images["train"].labels_B.unique().numel() < 2:
        raise DataError(f"all {len(images['train'])} training images belong to one class")
    return replace(loaded, images=images)


def _load_packaged(
    config: DataConfig, splits: Sequence[Split], image_hw: tuple[int, int]
) -> dict[Split, ImageSet]:
    """Load splits of a dataset with a fixed training and test part: shapes or CIFAR."""

    def load_part(part: Literal["train", "test"]) -> ImageSet:
        if config.dataset == "shapes":
            images = load_shapes(part)
        else:
            images = load_cifar(cast(Name, config.dataset), part, data_path=config.data_path)
        return add_shortcut(images, config.shortcut) if config.shortcut else images

    loaded: dict[Split, ImageSet] = {}
    if "train" in splits or "validation" in splits:
        train, loaded["validation"] = load_part("train").split(config.validation_images)
        loaded["train"] = train.sample(config.num_train_images)
    if "test" in splits:
        loaded["test"] = load_part("test").sample(config.num_test_images)
    # After the subsets are chosen by their pixels: they are the same images at every size.
    return {split: images.resized(image_hw, framing(config)) for split, images in loaded.items()}


def _load_arrays(
    config: DataConfig,
    splits: Sequence[Split],
    image_hw: tuple[int, int],
    n_channels: int,
    classes: Sequence[str],
) -> Loaded:
    """Load the subsets of a source of arrays that the settings request."""
    source = open_source(config)
    names, found = tuple(classes) or find_classes(source), choose_items(source, config, classes)
    for split in splits:
        if split not in found:
            raise DataError(f"{source.name}: there is no {split} split: give another --data_path")
    require_memory(sum(len(found[split].labels_B) for split in splits), image_hw, n_channels)
    images: dict[Split, ImageSet] = {}
    for split in splits:
        items = found[split]
        pictures = items.part.read(items.indices_B)
        if isinstance(pictures, list):
            images[split], config = _decode_items(config, pictures, items, names, image_hw)
            continue
        raw_BHWC = channels_last(pictures)
        if is_wide(raw_BHWC) and config.pixel_range is None:
            config = _with_range(config, source.name, found.get("train", items))
        raw_BCHW = torch.from_numpy(to_bytes(raw_BHWC, config.pixel_range)).permute(0, 3, 1, 2)
        labels_B = torch.from_numpy(items.labels_B)
        given = ImageSet(raw_BCHW.contiguous(), labels_B, names)
        images[split] = given.resized(image_hw, framing(config))
    # Every model reads floating-point numbers from 0 to 1 as they are: no need to store the range.
    unit = config.pixel_range == (0.0, 1.0)
    return Loaded(images, pixel_range=None if unit else config.pixel_range)


def _with_range(config: DataConfig, name: str, items: Items) -> DataConfig:
    """Return the settings with the range of wide (not 8-bit) training pictures, and log it."""
    pictures = items.part.read(items.indices_B)
    assert isinstance(pictures, np.ndarray)
    extent = formats.measure(pictures)
    pixel_range = formats.choose_range(extent)
    if pixel_range != (0.0, 1.0):
        log.warning("%s: %s", name, formats.describe(extent, pixel_range))
    return replace(config, pixel_range=pixel_range)


def _decode_items(
    config: DataConfig,
    files: Sequence[bytes],
    items: Items,
    names: tuple[str, ...],
    image_hw: tuple[int, int],
) -> tuple[ImageSet, DataConfig]:
    """Decode the contents of picture files; log and leave out those that cannot be decoded."""
    decoded = decode(
        files,
        size_hw=image_hw,
        fit=framing(config),
        num_workers=config.num_workers,
        n_channels=1 if items.part.gray else 3,
        pixel_range=config.pixel_range,
    )
    for index, reason in sorted(decoded.broken.items())[:NAMED]:
        log.warning("left out: picture %d: %s", items.indices_B[index], reason)
    valid = [index for index in range(len(files)) if index not in decoded.broken]
    if files and not valid:
        raise DataError(f"{config.data_path}: no picture can be decoded")
    labels_B = torch.from_numpy(items.labels_B[valid])
    images = ImageSet(torch.from_numpy(decoded.raw_BCHW), labels_B, names)
    return images, replace(config, pixel_range=decoded.pixel_range)


def _load_folder(
    config: DataConfig,
    splits: Sequence[Split],
    manifest: Manifest,
    image_hw: tuple[int, int],
    n_channels: int,
) -> Loaded:
    """Decode the subsets of a folder's splits that the settings request.

    A file that cannot be decoded is logged and left out.
    """
    limited = manifest.limited(config)
    require_memory(sum(len(limited.files.get(s, ())) for s in splits), image_hw, n_channels)
    images: dict[Split, ImageSet] = {}
    pixel_range = config.pixel_range
    for split in splits:
        if split == "test" and not limited.files.get("test"):
            raise DataError(
                f"{manifest.root}: there is no test split: give --split validation, or --data_path "
                "another folder"
            )
        paths, files = limited.paths(split), limited.files.get(split, ())
        decoded = decode(
            paths,
            size_hw=image_hw,
            fit=framing(config),
            num_workers=config.num_workers,
            n_channels=n_channels,
            pixel_range=pixel_range,
        )
        pixel_range = decoded.pixel_range
        for index, reason in sorted(decoded.broken.items())[:NAMED]:
            log.warning("left out: %s: %s", paths[index], reason)
        for index in decoded.broken:
            manifest = manifest.without(formats.left_out_reason(paths[index]), [files[index].path])
        valid = [file for index, file in enumerate(files) if index not in decoded.broken]
        _check_valid(limited, split, valid)
        labels_B = torch.tensor([file.label for file in valid], dtype=torch.int64)
        images[split] = ImageSet(torch.from_numpy(decoded.raw_BCHW), labels_B, manifest.classes)
    return Loaded(images, manifest, pixel_range)


def _check_valid(manifest: Manifest, split: Split, valid: Sequence[File]) -> None:
    """Log how many pictures are broken; refuse a split or training class with no valid one.

    Raises:
        DataError: no picture of the split, or none of a training class, can be decoded.
    """
    files = manifest.files.get(split, ())
    if len(valid) < len(files):
        log.warning("%d of %d %s pictures left out: they cannot be decoded",
                    len(files) - len(valid), len(files), split)  # fmt: skip
    if files and not valid:
        raise DataError(f"{manifest.root}: no picture of the {split} split can be decoded")
    lost = {file.label for file in files} - {file.label for file in valid}
    if split == "train" and lost:
        raise DataError(
            f"{manifest.root}: none of the training pictures of class "
            f"{manifest.classes[min(lost)]!r} can be decoded: repair them, or remove the folder"
        )


class Decoded(NamedTuple):
    """The valid pictures of a list of files, in their order (uint8), and what was found."""

    raw_BCHW: np.ndarray
    broken: dict[int, str]
    """Index -> reason, for the files that cannot be decoded."""
    pixel_range: PixelRange | None
    """The values of black and white in wide gray pictures: given, or inferred; None if neither."""


def decode(
    sources: Sequence[Source],
    *,
    size_hw: tuple[int, int],
    fit: Fit,
    num_workers: int,
    n_channels: int = 3,
    pixel_range: PixelRange | None = None,
) -> Decoded:
    """Decode picture files at one size, each once (wide gray ones twice, if no range is given).

    Args:
        sources: the files, or their contents.
        size_hw: height and width of the result in pixels.
        fit: how a picture of another shape is fitted.
        num_workers: number of threads; each holds one picture in memory.
        n_channels: 3 for RGB, 1 for gray.
        pixel_range: values of black and white in wide gray pictures. Default: inferred from all.
    """
    raw_BCHW = np.empty((len(sources), n_channels, *size_hw), np.uint8)
    broken: dict[int, str] = {}
    wide: dict[int, Extent] = {}

    def decode_one(index: int) -> None:
        """Decode a picture into its slot; measure a wide one as long as the range is unknown."""
        try:
            pixels = formats.read_pixels(sources[index], shorter_side=enough_side(size_hw, fit))
        except PictureError as error:
            broken[index] = str(error)
            return
        if pixels.ndim == 2:
            if pixel_range is None:
                wide[index] = formats.measure(pixels)
                return
            pixels = formats.gray_to_rgb(formats.to_bytes(pixels, pixel_range))
        raw_BCHW[index] = fit_channels(pixels, size_hw, fit, n_channels).transpose(2, 0, 1)

    _run_threads(decode_one, range(len(sources)), num_workers, "decoding")
    if wide:
        extent = formats.join(wide.values())
        pixel_range = formats.choose_range(extent)
        log.warning(
            "wide gray pictures: %d files, %s", len(wide), formats.describe(extent, pixel_range)
        )
        _run_threads(decode_one, sorted(wide), num_workers, "decoding wide gray pictures")
    valid = [index for index in range(len(sources)) if index not in broken]
    for target, index in enumerate(valid):  # in place, to avoid a second copy
        if target != index:
            raw_BCHW[target] = raw_BCHW[index]
    return Decoded(raw_BCHW[: len(valid)], broken, pixel_range)


def _run_threads(
    work: Callable[[int], None], indices: Sequence[int], num_workers: int, title: str
) -> None:
    """Call ``work`` with each index, in threads, showing progress on a terminal.

    An exception or Ctrl-C stops all threads after their current block.
    """
    blocks = [indices[start : start + BLOCK] for start in range(0, len(indices), BLOCK)]
    silent = sys.stderr is None or not sys.stderr.isatty()

    def work_on(block: Sequence[int]) -> None:
        for index in block:
            work(index)

    with (
        Progress(console=Console(stderr=True), disable=silent) as progress,
        ThreadPoolExecutor(max(1, num_workers)) as pool,
    ):
        for _ in progress.track(pool.map(work_on, blocks), len(blocks), description=title):
            pass


def require_memory(count: int, image_hw: tuple[int, int], n_channels: int) -> None:
    """Refuse to decode more images than fit in memory.

    Raises:
        DataError: they do not fit; the message gives both sizes.
    """
    height, width = image_hw
    needed, free = int(count * height * width * n_channels * DECODING), available_memory()
    if free is not None and needed > free:
        raise DataError(
            f"{count:,} images of {height} x {width} pixels need {needed / GIB:.1f} GiB of memory, "
            f"but {free / GIB:.1f} GiB are free: lower --image_size or --num_train_images"
        )


def available_memory() -> int | None:
    """Return how many bytes are free on this machine and in its container (control group 2).

    None if that is unknown, as on systems other than Linux.
    """

    def number(file: Path, pattern: str) -> int:
        match = re.search(pattern, file.read_text(encoding="ascii"), re.MULTILINE)
        if match is None:  # for example "max": no limit
            raise ValueError(pattern)
        return int(match[1])

    try:
        free = number(MEMORY, r"^MemAvailable: +(\d+) kB") * 1024
    except (OSError, ValueError):
        return None
    try:
        used = number(CGROUP / "memory.current", r"(\d+)")
        cached = number(CGROUP / "memory.stat", r"^inactive_file (\d+)")
        return min(free, number(CGROUP / "memory.max", r"(\d+)") - used + cached)
    except (OSError, ValueError):
        return free
