"""Pictures of a run: the same few images, drawn during training with what the model looks at."""

import textwrap
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from vitrail.config.drawing import Look
from vitrail.config.settings import Config, require
from vitrail.data.images import ImageSet, normalize
from vitrail.evaluation.metrics import evaluating
from vitrail.evaluation.report import drawable, save_figure
from vitrail.explain.explanation import CORRECT, WRONG
from vitrail.explain.map_settings import MapSettings
from vitrail.explain.methods import compute_maps
from vitrail.explain.panels import GREEN, RED, show_map

TRAINING_IMAGES = 8
"""Number of images that are drawn during training."""


def choose_images(validation: ImageSet, every: int) -> ImageSet:
    """Return the images to draw: the same in every epoch, spread evenly over the split.

    Raises:
        ConfigError: pictures are wanted (``every`` is not 0), but there is no validation image.
    """
    require(
        not every or len(validation) > 0,
        "attention_epochs draws validation images: give validation_images",
    )
    spread_B = torch.linspace(0, max(0, len(validation) - 1), TRAINING_IMAGES).long().unique()
    return validation.take(spread_B[: len(validation)])


def draw_attention(model: nn.Module, images: ImageSet, config: Config, path: Path) -> None:
    """Draw each image with its label, and below it its attention rollout with the prediction.

    Raises:
        OutputError: the file cannot be written.
    """
    device = next(model.parameters()).device
    images_BCHW = normalize(images.raw_BCHW.to(device), config.data.mean, config.data.std)
    with evaluating(model):
        maps = compute_maps(model, images_BCHW, MapSettings(method="rollout"))  # type: ignore[arg-type]
    figure = Figure(figsize=(1.6 * len(images), 3.8), layout="constrained", facecolor="white")
    axes: Any = figure.subplots(2, len(images), squeeze=False)
    for column, guess in enumerate(maps.logits_BY.argmax(dim=1).tolist()):
        raw_HWC = images.raw_BCHW[column].permute(1, 2, 0).numpy()
        map_GJ = maps.values_BLGJ[column, -1].numpy()
        upper, lower = axes[:, column]
        show_map(upper, raw_HWC, look=Look())
        show_map(lower, raw_HWC, map_GJ, look=Look(style="reference"))
        label = int(images.labels_B[column])
        mark, ink = (CORRECT, GREEN["light"]) if guess == label else (WRONG, RED["light"])
        upper.set_title(drawable(images.classes[label], 14), fontsize=9, parse_math=False)
        words = f"{mark} {drawable(images.classes[guess], 12)}"
        lower.set_title(words, fontsize=9, parse_math=False, color=ink)
    about = "Above: image and label. Below: attention rollout and prediction."
    figure.suptitle(textwrap.fill(about, 24 * len(images)), fontsize=9)
    save_figure(figure, path, dpi=80)
