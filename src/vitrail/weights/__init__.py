"""From a name, file or hub id to a model, and back."""
