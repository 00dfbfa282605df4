"""The learning rate as a function of the step."""

import math

from vitrail.config.settings import TrainingConfig


def multiplier(step: int, config: TrainingConfig, *, steps_per_epoch: int) -> float:
    """Return the learning rate of update ``step`` (from 0), relative to the highest.

    It rises as (t + 1) / warmup, then falls along a half cosine or a line from 1 to
    minimum_learning_rate / learning_rate. t counts updates, or with ``schedule_by`` epoch epochs,
    which is the closed form of LinearLR and CosineAnnealingLR in the reference implementation.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, for the cosine.
    """
    t, total, warmup = step / steps_per_epoch, float(config.epochs), config.warmup
    if config.schedule_by == "epoch":
        t = float(math.floor(t))
    else:
        t, total, warmup = float(step), total * steps_per_epoch, warmup * steps_per_epoch
    if t < warmup:
        return min(1.0, (t + 1) / warmup)
    progress = (t - warmup) / (total - warmup)
    falling = (
        (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    )
    floor = config.minimum_learning_rate / config.learning_rate
    return floor + (1 - floor) * falling
