"""Training: the loop, optimizers and schedule; runs, their folders and trackers."""
