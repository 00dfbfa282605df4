"""The learning rate: the reference's schedule by epoch, closed forms by step."""

import math
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from vitrail.config.presets import get_preset
from vitrail.config.settings import TrainingConfig
from vitrail.training.optim import multiplier


def reference_rates(epochs: int, warmup: int) -> list[float]:
    """The learning rate of every epoch as the reference's two schedulers set it."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 5e-4)
    rising = LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
    falling = CosineAnnealingLR(optimizer, epochs - warmup, 1e-5)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stepping a schedule without an optimizer step
        for epoch in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            (rising if epoch < warmup else falling).step()
    return rates


def test_the_reference_preset_follows_the_references_schedulers() -> None:
    config = get_preset("reference").training
    ours = [5e-4 * multiplier(epoch * 7, config, steps_per_epoch=7) for epoch in range(200)]
    assert ours == pytest.approx(reference_rates(200, 10), rel=1e-6)
    within = {multiplier(step, config, steps_per_epoch=7) for step in range(21, 28)}
    assert len(within) == 1


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.5), ("linear", 0.5)])
def test_by_step_the_multiplier_rises_to_one_and_falls_to_the_minimum(
    schedule: str, middle: float
) -> None:
    config = TrainingConfig(
        epochs=11, warmup_epochs=1, learning_rate=0.1, minimum_learning_rate=0.01,
        schedule=schedule,  # type: ignore[arg-type]
    )  # fmt: skip
    rates = [multiplier(step, config, steps_per_epoch=10) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1
    assert rates[60] == pytest.approx(0.1 + 0.9 * middle)
    assert rates[109] > 0.1
    assert rates[109] == pytest.approx(0.1, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_cosine_and_linear_schedules_differ() -> None:
    cosine, line = (
        multiplier(25, TrainingConfig(epochs=1, warmup_epochs=0, schedule=s), steps_per_epoch=100)
        for s in ("cosine", "linear")
    )
    assert cosine == pytest.approx(0.02 + 0.98 * (1 + math.cos(math.pi / 4)) / 2)
    assert line == pytest.approx(0.02 + 0.98 * 0.75)


def test_without_warmup_the_schedule_starts_at_the_peak() -> None:
    assert multiplier(0, TrainingConfig(epochs=3, warmup_epochs=0), steps_per_epoch=5) == 1
