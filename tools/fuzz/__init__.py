"""Fuzzing of every reader of files; see ``__main__.py``."""
