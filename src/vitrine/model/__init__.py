"""The Vision Transformer, from scratch."""

from vitrine.model.vit import VisionTransformer

__all__ = ["VisionTransformer"]
