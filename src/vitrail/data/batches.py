"""The batches of a run as a function of the step: order, augmentation, mixing."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.config.settings import Config
from vitrail.data.augment import (
    cutmix,
    flip,
    mixup,
    patch_drop,
    rand_augment,
    random_crop,
    random_erasing,
    random_flip,
)
from vitrail.data.images import ImageSet, normalize
from vitrail.errors import DataError
from vitrail.runtime import rng


class Batch(NamedTuple):
    """The input of one training step.

    Shapes:
        images_BCHW: normalized; targets_BY: class probabilities; labels_B: int64, the class of
        each image before any mixing.
    """

    images_BCHW: Tensor
    targets_BY: Tensor
    labels_B: Tensor


class Batches:
    """The batches of a run as a function of the step: ``batches(step)``.

    The whole dataset is kept on the training device as bytes. An epoch visits every image once;
    its last batch may be smaller. A batch depends on the step and the seed only, not on earlier
    calls.

    Raises:
        DataError: there are no images.
    """

    def __init__(self, images: ImageSet, config: Config, *, device: torch.device) -> None:
        if len(images) == 0:
            raise DataError("there are no images to train on: raise num_train_images")
        self.raw_BCHW = images.raw_BCHW.to(device)
        self.labels_B = images.labels_B.to(device)
        self.n_classes = len(images.classes)
        self.config, self.seed, self.device = config.augment, config.run.seed, device
        self.mean, self.std = config.data.mean, config.data.std
        self.patch_size = config.model.patch_size
        self.batch_size = config.training.batch_size
        self.steps_per_epoch = -(-len(images) // self.batch_size)
        self.steps = config.training.epochs * self.steps_per_epoch
        self._latest: tuple[int, Tensor] = (-1, torch.empty(0))

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        indices_B = self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        generator = rng.generator(self.seed, "augment", step)
        raw_BCHW = self._augment(self.raw_BCHW[indices_B], step, generator)
        if self.config.flip == "alternating":
            raw_BCHW = flip(raw_BCHW, self._mirrored(epoch)[indices_B])
        labels_B = self.labels_B[indices_B]
        images_BCHW = normalize(raw_BCHW, self.mean, self.std)
        targets_BY = F.one_hot(labels_B, self.n_classes).float()
        images_BCHW, targets_BY = self._mix(images_BCHW, targets_BY, step, generator)
        return Batch(self._drop(images_BCHW, step), targets_BY, labels_B)

    def _mirrored(self, epoch: int) -> Tensor:
        """Return which images of the dataset are mirrored in an epoch; the others are in the next.

        Source: Jordan 2024, arXiv:2404.00498, section 3.6.
        """
        generator = rng.generator(self.seed, "flip")
        first_B = torch.randint(2, (len(self.labels_B),), generator=generator, dtype=torch.bool)
        return (first_B ^ bool(epoch % 2)).to(self.device)

    def _order(self, epoch: int) -> Tensor:
        """Return the order of an epoch; the latest is cached."""
        if self._latest[0] != epoch:
            generator = rng.generator(self.seed, "order", epoch)
            order_B = torch.randperm(len(self.labels_B), generator=generator)
            self._latest = (epoch, order_B.to(self.device))
        return self._latest[1]

    def _augment(self, raw_BCHW: Tensor, step: int, generator: torch.Generator) -> Tensor:
        """Augment the bytes of the images."""
        config = self.config
        strong = step < config.strong_until * self.steps
        if config.crop_padding:
            raw_BCHW = random_crop(raw_BCHW, generator, config.crop_padding)
        if config.flip == "random":
            raw_BCHW = random_flip(raw_BCHW, generator)
        if strong and config.randaugment_ops:
            magnitude = config.randaugment_magnitude
            raw_BCHW = rand_augment(raw_BCHW, generator, config.randaugment_ops, magnitude)
        if strong and config.random_erasing:
            raw_BCHW = random_erasing(raw_BCHW, generator, config.random_erasing)
        return raw_BCHW

    def _mix(
        self, images_BCHW: Tensor, targets_BY: Tensor, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mix the images of the batch by mixup or cutmix; if both are enabled, by one at random."""
        config = self.config
        enabled = [(m, a) for m, a in ((mixup, config.mixup), (cutmix, config.cutmix)) if a]
        if not enabled or step >= config.mix_until * self.steps:
            return images_BCHW, targets_BY
        pick = int(torch.randint(len(enabled), (), generator=generator))
        if float(torch.rand((), generator=generator)) >= config.mix_probability:
            return images_BCHW, targets_BY
        mix, alpha = enabled[pick]
        return mix(images_BCHW, targets_BY, generator, alpha)

    def _drop(self, images_BCHW: Tensor, step: int) -> Tensor:
        """Replace patches of the images in some batches."""
        if not self.config.patch_drop:
            return images_BCHW
        generator = rng.generator(self.seed, "patch_drop", step)
        if float(torch.rand((), generator=generator)) >= self.config.patch_drop:
            return images_BCHW
        return patch_drop(images_BCHW, generator, self.patch_size)
