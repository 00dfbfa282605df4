"""Settings and the names of splits -> images in memory, whatever the data set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitrail.config.settings import DataConfig, Split
from vitrail.data.cifar import load_cifar
from vitrail.data.folder import load_folder
from vitrail.data.framing import fit_picture, framing
from vitrail.data.images import ImageSet
from vitrail.data.layout import left_out_reason
from vitrail.data.manifest import Manifest, scan
from vitrail.data.memory import require_memory
from vitrail.data.randaugment import gray
from vitrail.data.shapes import load_shapes
from vitrail.data.split import split_indices
from vitrail.errors import DataError


@dataclass(frozen=True)
class Loaded:
    """Splits in memory, and what reading them found out."""

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

    Validation is cut from the training part, always the same images; it may be empty. The test
    split is opened only where it is named.

    Raises:
        DataError: the data are missing, damaged, or would run code.
        ConfigError: more validation images are asked for than there are.
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
    """Load splits as ``load_splits`` does; of a folder, those that the manifest lists."""
    if config.dataset == "folder":
        manifest = manifest or scan(config.data_path, config.validation_images)
        loaded = read_folder(config, splits, manifest, image_hw, n_channels)
    else:
        loaded = Loaded(load_packaged(config, splits, image_hw))
    images = {split: to_gray(loaded.images[split], n_channels) for split in splits}
    if "train" in images and images["train"].labels_B.unique().numel() < 2:
        raise DataError(f"all {len(images['train'])} training images belong to one class")
    return Loaded(images, loaded.manifest, loaded.pixel_range)


def read_folder(
    config: DataConfig,
    splits: Sequence[Split],
    manifest: Manifest,
    image_hw: tuple[int, int],
    n_channels: int,
) -> Loaded:
    """Decode the subsets of a folder's splits that the settings ask for."""
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


def load_packaged(
    config: DataConfig, splits: Sequence[Split], image_hw: tuple[int, int]
) -> dict[Split, ImageSet]:
    """Load splits of a data set that is not a folder of the user's."""
    loaded: dict[Split, ImageSet] = {}
    if "train" in splits or "validation" in splits:
        images = load_part(config, "train", image_hw)
        train_B, validation_B = split_indices(images.labels_B, config.validation_images)
        loaded["train"] = images.take(train_B).sample(config.num_train_images)
        loaded["validation"] = images.take(validation_B)
    if "test" in splits:
        loaded["test"] = load_part(config, "test", image_hw).sample(config.num_test_images)
    return loaded


def load_part(
    config: DataConfig, part: Literal["train", "test"], image_hw: tuple[int, int]
) -> ImageSet:
    """Load the files' test part, or their training part, which validation is cut from."""
    if config.dataset == "shapes":
        return resize(load_shapes(part), image_hw, config)
    assert config.dataset != "folder"
    return resize(load_cifar(config.dataset, part, data_path=config.data_path), image_hw, config)


def resize(images: ImageSet, image_hw: tuple[int, int], config: DataConfig) -> ImageSet:
    """Bring images of one size to the model's, and their masks with them."""
    if tuple(images.raw_BCHW.shape[-2:]) == image_hw and config.crop_pct == 1:
        return images
    fitted = [
        fit_picture(raw_HWC, image_hw, framing(config))
        for raw_HWC in images.raw_BCHW.permute(0, 2, 3, 1).numpy()
    ]
    raw_BCHW = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).contiguous()
    masks_BHW = images.masks_BHW
    if masks_BHW is not None:
        masks_BHW = resize_masks(masks_BHW, image_hw, config)
    return ImageSet(raw_BCHW, images.labels_B, images.classes, masks_BHW)


def resize_masks(masks_BHW: Tensor, image_hw: tuple[int, int], config: DataConfig) -> Tensor:
    """Bring masks to a size the way their pictures went; a pixel is in where half of it is."""
    masks = (masks_BHW.numpy()[..., None] * np.uint8(255)).repeat(3, axis=3)
    fitted = np.stack([fit_picture(mask_HWC, image_hw, framing(config)) for mask_HWC in masks])
    return torch.from_numpy(fitted[..., 0] >= 128)


def to_gray(images: ImageSet, n_channels: int) -> ImageSet:
    """Turn color images into gray ones, as Pillow does, where the model has one channel."""
    if images.raw_BCHW.shape[1] == n_channels:
        return images
    return replace(images, raw_BCHW=gray(images.raw_BCHW))
