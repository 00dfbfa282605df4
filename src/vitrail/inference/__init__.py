"""Pictures to predictions."""
