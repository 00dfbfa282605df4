"""Vitrine: a Vision Transformer for small images."""
