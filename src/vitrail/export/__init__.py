"""A trained model in formats that other programs run, each checked against the model."""
