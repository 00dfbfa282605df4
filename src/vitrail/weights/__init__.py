"""A name, file or hub id to a model, and back."""
