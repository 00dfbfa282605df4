"""A network traced to a graph that runs without Python."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitrail.model.vit import VisionTransformer

Outputs = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Normalized images (B, C, H, W) -> logits (B, Y), features (B, D)."""


class LogitsAndFeatures(nn.Module):
    """A model that also returns the features that its head reads."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, Y) and the features (B, D)."""
        features_BD = self.model.features(images_BCHW)
        return self.model.head(features_BD), features_BD


def trace(model: VisionTransformer) -> Outputs:
    """Return the model with its features as a graph, for any number of images.

    torch.jit is deprecated in favor of torch.export and torch.compile. But what torch.export
    returns is a Python module, and torch.compile needs a C++ compiler and a minute.
    """
    config, device = model.config, next(model.parameters()).device
    images_BCHW = torch.zeros(2, config.n_channels, *config.image_hw, device=device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        # The graph does not check the shape of its images.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean")
        graph: Outputs = torch.jit.trace(LogitsAndFeatures(model), images_BCHW, check_trace=False)
    return graph
