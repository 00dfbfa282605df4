"""Settings and the names of splits -> images in memory, for every data set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vitrail.config.settings import DataConfig, Split
from vitrail.data.cifar import load_cifar
from vitrail.data.folder import load_folder
from vitrail.data.framing import framing
from vitrail.data.images import ImageSet
from vitrail.data.layout import left_out_reason
from vitrail.data.manifest import Manifest, scan
from vitrail.data.memory import require_memory
from vitrail.data.shapes import load_shapes
from vitrail.errors import DataError


@dataclass(frozen=True)
class Loaded:
    """Splits in memory, and what was found while reading them."""

    images: dict[Split, ImageSet]
    manifest: Manifest | None = None
    """Of a folder: its files, without those that could not be decoded."""
    pixel_range: tuple[float, float] | None = None
    """Of a folder with 16-bit or floating-point pictures: their values of black and white."""


def load_splits(
    config: DataConfig,
    splits: Sequence[Split],
    *,
    image_hw: tuple[int, int] = (32, 32),
    n_channels: int = 3,
) -> dict[Split, ImageSet]:
    """Load splits at the model's size, in color (3 channels) or gray (1).

    Validation is split off the training images, always the same ones; it may be empty. The test
    split is opened only if it is among ``splits``.

    Raises:
        DataError: the data set is missing, corrupt, or would run code.
        ConfigError: more validation images are requested than there are.
    """
    return load_data(config, splits, image_hw=image_hw, n_channels=n_channels).images


def load_data(
    config: DataConfig,
    splits: Sequence[Split],
    *,
    image_hw: tuple[int, int] = (32, 32),
    n_channels: int = 3,
    manifest: Manifest | None = None,
) -> Loaded:
    """Load splits like ``load_splits``; of a folder, the files that the manifest lists."""
    if config.dataset == "folder":
        manifest = manifest or scan(config.data_path, config.validation_images)
        loaded = _read_folder(config, splits, manifest, image_hw, n_channels)
    else:
        loaded = Loaded(_load_packaged(config, splits, image_hw))
    images = {split: loaded.images[split].with_channels(n_channels) for split in splits}
    if "train" in images and images["train"].labels_B.unique().numel() < 2:
        raise DataError(f"all {len(images['train'])} training images belong to one class")
    return Loaded(images, loaded.manifest, loaded.pixel_range)


def _read_folder(
    config: DataConfig,
    splits: Sequence[Split],
    manifest: Manifest,
    image_hw: tuple[int, int],
    n_channels: int,
) -> Loaded:
    """Decode the subsets of a folder's splits that the settings request."""
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
        found = load_folder(
            limited, split, replace(config, pixel_range=pixel_range),
            image_hw=image_hw, n_channels=n_channels,
        )  # fmt: skip
        images[split] = found.images
        for path in found.broken:
            manifest = manifest.without(left_out_reason(path), [path])
        pixel_range = found.pixel_range or pixel_range
    return Loaded(images, manifest, pixel_range)


def _load_packaged(
    config: DataConfig, splits: Sequence[Split], image_hw: tuple[int, int]
) -> dict[Split, ImageSet]:
    """Load splits of a data set with a fixed training and test part: shapes or CIFAR."""

    def load_part(part: Literal["train", "test"]) -> ImageSet:
        if config.dataset == "shapes":
            images = load_shapes(part)
        else:
            assert config.dataset != "folder"
            images = load_cifar(config.dataset, part, data_path=config.data_path)
        return images.resized(image_hw, framing(config))

    loaded: dict[Split, ImageSet] = {}
    if "train" in splits or "validation" in splits:
        train, loaded["validation"] = load_part("train").split(config.validation_images)
        loaded["train"] = train.sample(config.num_train_images)
    if "test" in splits:
        loaded["test"] = load_part("test").sample(config.num_test_images)
    return loaded
