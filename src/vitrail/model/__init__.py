"""The Vision Transformer, from scratch."""

from vitrail.model.vit import VisionTransformer

__all__ = ["VisionTransformer"]
