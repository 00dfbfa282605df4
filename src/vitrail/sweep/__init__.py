"""Searching for good settings: many short runs, chosen and cut short by Optuna."""
