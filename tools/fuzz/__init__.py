"""Fuzzing of every file reader; see ``__main__.py``."""
