"""The one door to data: settings and the name of a split -> images in memory."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitrine.config import DataConfig, Split
from vitrine.data.cifar import load_cifar
from vitrine.data.folder import load_folder
from vitrine.data.images import ImageSet
from vitrine.data.pictures import fit_picture
from vitrine.data.randaugment import gray
from vitrine.data.shapes import load_shapes
from vitrine.data.split import split_indices
from vitrine.errors import DataError


def load_splits(
    config: DataConfig,
    splits: Sequence[Split],
    *,
    image_hw: tuple[int, int] = (32, 32),
    n_channels: int = 3,
) -> dict[Split, ImageSet]:
    """Load splits at the model's size, in colour (3 channels) or gray (1).

    Validation is cut from the files' training part, always the same; it may be empty. The test
    split is opened only where it is named.

    Raises:
        DataError: the data are missing, damaged, or would run code.
        ConfigError: more validation images are asked for than there are.
    """
    loaded: dict[Split, ImageSet] = {}
    if "train" in splits or "validation" in splits:
        images = load_file_part(config, "train", image_hw)
        train_B, validation_B = split_indices(images.labels_B, config.validation_images)
        loaded["train"] = images.take(train_B).first(config.num_train_images)
        loaded["validation"] = images.take(validation_B)
    if "test" in splits:
        loaded["test"] = load_file_part(config, "test", image_hw).first(config.num_test_images)
    return {split: finish(loaded[split], split, n_channels) for split in splits}


def finish(images: ImageSet, split: Split, n_channels: int) -> ImageSet:
    """Refuse a training split that teaches nothing; turn images gray if that is wanted."""
    if split == "train" and images.labels_B.unique().numel() < 2:
        raise DataError(
            f"the {len(images)} training images are all of one class: raise num_train_images"
        )
    return to_gray(images) if n_channels == 1 else images


def load_file_part(
    config: DataConfig, part: Literal["train", "test"], image_hw: tuple[int, int]
) -> ImageSet:
    """Load the files' test part, or their training part, which validation is cut from."""
    if config.dataset == "folder":
        return load_folder(
            config.data_path,
            part,
            size_hw=image_hw,
            fit=config.fit,
            num_workers=config.num_workers,
        )
    if config.dataset == "shapes":
        return resize(load_shapes(part), image_hw, config)
    return resize(load_cifar(config.dataset, part, data_path=config.data_path), image_hw, config)


def resize(images: ImageSet, image_hw: tuple[int, int], config: DataConfig) -> ImageSet:
    """Bring images of one size to the model's, and their masks with them."""
    if tuple(images.raw_BCHW.shape[-2:]) == image_hw:
        return images
    fitted = [
        fit_picture(raw_HWC, image_hw, config.fit)
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
    fitted = np.stack([fit_picture(mask_HWC, image_hw, config.fit) for mask_HWC in masks])
    return torch.from_numpy(fitted[..., 0] >= 128)


def to_gray(images: ImageSet) -> ImageSet:
    """Turn colour images into gray ones, as Pillow does."""
    return ImageSet(gray(images.raw_BCHW), images.labels_B, images.classes, images.masks_BHW)
