"""Weights of the reference implementation, timm, Hugging Face and Google."""
