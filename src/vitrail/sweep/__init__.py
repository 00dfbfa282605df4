"""Hyperparameter search: many short runs, chosen and pruned by Optuna."""
