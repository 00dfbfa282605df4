"""The pictures that a manifest lists -> images in memory."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from vitrail.config.settings import DataConfig, Split
from vitrail.data.decode import decode
from vitrail.data.framing import framing
from vitrail.data.images import ImageSet
from vitrail.data.manifest import Manifest
from vitrail.errors import DataError

log = logging.getLogger("vitrail")

NAMED = 5
"""Broken files that are named in the log; the manifest has them all."""


class LoadedFolder(NamedTuple):
    """A split of a folder, and what decoding it found out."""

    images: ImageSet
    broken: tuple[Path, ...]
    """Files that could not be decoded."""
    pixel_range: tuple[float, float] | None


def load_folder(
    manifest: Manifest,
    split: Split,
    config: DataConfig,
    *,
    image_hw: tuple[int, int] = (32, 32),
    n_channels: int = 3,
) -> LoadedFolder:
    """Decode the pictures of a split, each once, in parallel.

    A file that cannot be decoded is reported and left out.

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
    if paths and not len(decoded.sound):
        raise DataError(f"{manifest.root}: no picture of the {split} split can be decoded")
    all_labels = manifest.labels(split)
    labels = [all_labels[index] for index in decoded.sound]
    if split == "train":
        require_every_class(manifest, set(all_labels) - set(labels))
    images = ImageSet(decoded.raw_BCHW, torch.tensor(labels, dtype=torch.int64), manifest.classes)
    broken = tuple(path for path, _ in decoded.broken)
    return LoadedFolder(images, broken, decoded.pixel_range)


def require_every_class(manifest: Manifest, lost: set[int]) -> None:
    """Refuse training classes of which no picture is left."""
    for label in sorted(lost):
        name = manifest.classes[label]
        raise DataError(
            f"{manifest.root}: none of the training pictures of class {name!r} can be decoded: "
            "repair them, or remove the folder"
        )
