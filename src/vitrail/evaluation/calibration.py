"""What validation images teach about a model: how sure to be, and which pictures are unlike them.

The logits are divided by one temperature, fitted on validation, before they become probabilities:
neither their order nor the accuracy changes (Guo et al. 2017, arXiv:1706.04599). A picture whose
energy is lower than that of nearly all validation images is unlike the training images (Liu et al.
2020, arXiv:2010.03759, with the opposite sign: high is familiar). Imports torch only to fit.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vitrail.config.files import Checked
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FALSE_ALARMS = 0.05
"""Share of the validation images that counts as unlike the training images."""
FEWEST_IMAGES = 100
"""With fewer validation images, the threshold would rest on less than five of them."""
SHARES = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Calibration(Checked):
    """How a model's logits become probabilities and a familiarity; kept with its weights."""

    temperature: float = 1.0
    """What the logits are divided by; 1 if it was not fitted."""
    energies: tuple[float, ...] = ()
    """Percentiles 0 to 100 of the energy of validation images; none if there were too few."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < np.inf:
            raise ConfigError(f"temperature is {self.temperature}: give a positive number")
        if len(self.energies) not in (0, len(SHARES)) or not np.isfinite(self.energies).all():
            raise ConfigError(f"energies must be {len(SHARES)} finite numbers, or none")

    def probabilities(self, logits_BY: np.ndarray) -> np.ndarray:
        """Return the probabilities (B, Y)."""
        logits_BY = logits_BY / np.asarray(self.temperature, logits_BY.dtype)
        powers_BY = np.exp(logits_BY - logits_BY.max(axis=-1, keepdims=True))
        return powers_BY / powers_BY.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]

    def familiarity(self, logits_BY: np.ndarray) -> np.ndarray | None:
        """Return the share (B,) of validation images with a lower energy; None if not known."""
        if not self.energies:
            return None
        familiarity_B: np.ndarray = np.interp(
            energy(logits_BY, self.temperature), self.energies, SHARES
        )
        return familiarity_B


UNCALIBRATED = Calibration()


def energy(logits_BY: np.ndarray, temperature: float) -> np.ndarray:
    """Return log(sum(exp(logits / temperature))), (B,)."""
    energy_B: np.ndarray = np.logaddexp.reduce(logits_BY.astype(np.float64) / temperature, axis=-1)
    return energy_B


def describe_unlike(familiarity: np.ndarray | float | None) -> str:
    """Return what to say of a picture that is unlike the training images, else ""."""
    if familiarity is None or (familiarity := np.asarray(familiarity).item()) >= FALSE_ALARMS:
        return ""
    share = f"{familiarity:.1%}" if familiarity >= 0.001 else "less than 0.1%"
    return f"unlike the training images ({share} of validation images score lower)"


def fit(logits_BY: "Tensor", labels_B: "Tensor") -> Calibration:
    """Fit temperature and energies to the logits of validation images.

    The temperature minimizes the cross-entropy. Its targets are smoothed as in Platt 1999, as if
    two further images had been seen, one right and one wrong: so a few images that are all right
    do not make a model certain.
    """
    import torch
    from torch.nn import functional as F

    logits_BY = logits_BY.double()
    log_temperature = torch.zeros((), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        scaled_BY, smoothing = logits_BY / log_temperature.exp(), 1 / (len(labels_B) + 2)
        value = F.cross_entropy(scaled_BY, labels_B, label_smoothing=smoothing)
        value.backward()
        return value.item()

    optimizer.step(loss)
    temperature = log_temperature.clamp(-5, 5).exp().item()
    if len(labels_B) < FEWEST_IMAGES:
        return Calibration(temperature)
    energies = np.quantile(energy(logits_BY.numpy(), temperature), SHARES)
    return Calibration(temperature, tuple(energies.tolist()))
