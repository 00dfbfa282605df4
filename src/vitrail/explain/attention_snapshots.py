"""Pictures of what a model attends to in the same few images during training."""

import textwrap
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from vitrail.config.settings import Config
from vitrail.data.images import ImageSet, normalize
from vitrail.errors import ConfigError, OutputError
from vitrail.evaluation.metrics import evaluating
from vitrail.explain import draw
from vitrail.explain.draw import BLACK, GREEN, RED
from vitrail.explain.explanation import CORRECT, WRONG
from vitrail.explain.methods import MapSettings, compute_maps

IMAGES = 8
"""Number of images."""


def choose_images(validation: ImageSet, every: int) -> ImageSet:
    """Return the images to draw: the same in every epoch, spread evenly over the split.

    Raises:
        ConfigError: pictures are wanted (``every`` is not 0), but there is no validation image.
    """
    if every and not len(validation):
        raise ConfigError("attention_epochs draws validation images: give validation_images")
    spread_B = torch.linspace(0, max(0, len(validation) - 1), IMAGES).long().unique()
    return validation.take(spread_B[: len(validation)])


def draw_attention(model: nn.Module, images: ImageSet, config: Config, path: Path) -> Path:
    """Draw each image, and below it its attention rollout through all blocks; return path.

    The title of an image is its label; the title of its map is the prediction, marked as correct
    or wrong.

    Raises:
        OutputError: the file cannot be written.
    """
    device = next(model.parameters()).device
    images_BCHW = normalize(images.raw_BCHW.to(device), config.data.mean, config.data.std)
    with evaluating(model):
        maps = compute_maps(model, images_BCHW, MapSettings())  # type: ignore[arg-type]
    figure = Figure(figsize=(1.6 * len(images), 3.8), layout="constrained", facecolor="white")
    axes: Any = figure.subplots(2, len(images), squeeze=False)
    guesses = maps.logits_BY.argmax(dim=1).tolist()
    for column, guess in enumerate(guesses):
        raw_HWC = images.raw_BCHW[column].permute(1, 2, 0).expand(-1, -1, 3).numpy()
        size_hw = (raw_HWC.shape[0], raw_HWC.shape[1])
        map_GJ = draw.normalize(maps.values_BLGJ[column, -1:].cpu().numpy(), "frame")[0]
        seen_HWC = draw.dim(raw_HWC, draw.place(map_GJ, size_hw, size_hw, config.data.fit))
        label = int(images.labels_B[column])
        mark, ink = (CORRECT, GREEN) if guess == label else (WRONG, RED)
        upper = raw_HWC, images.classes[label][:14], BLACK
        lower = seen_HWC, f"{mark} {images.classes[guess][:12]}", ink
        for axis, (picture_HWC, title, color) in zip(axes[:, column], (upper, lower), strict=True):
            axis.imshow(picture_HWC)
            axis.set_title(title, fontsize=9, parse_math=False, color=color)
            axis.set_axis_off()
    about = "Above: image and label. Below: attention rollout and prediction."
    figure.suptitle(textwrap.fill(about, 24 * len(images)), fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    return path
