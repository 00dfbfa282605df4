"""How a picture of any shape becomes one of the model's size: which part, and which filter."""

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from vitrail.config.settings import DataConfig

FitWord = Literal["crop", "pad", "squash"]


@dataclass(frozen=True)
class Framing:
    """Which part of a picture the model sees, and how that part is resized."""

    fit: FitWord = "crop"
    """The largest part of the model's shape (crop), all of it on black (pad), or stretched."""
    interpolation: str = "bilinear"
    """Pillow's name of the filter. All of them are antialiased."""
    crop_pct: float = 1.0
    """Share of that part, around its center and per side, that is kept; only 1 with pad."""

    @classmethod
    def of(cls, fit: "Fit") -> "Framing":
        """Return the framing that a word stands for."""
        return fit if isinstance(fit, Framing) else cls(fit)

    @property
    def resampling(self) -> Image.Resampling:
        """Pillow's filter."""
        return Image.Resampling[self.interpolation.upper()]


Fit = FitWord | Framing
"""A word stands for the framing that has it and is otherwise the default."""


def framing(config: DataConfig) -> Framing:
    """Return the framing of a run's pictures."""
    return Framing(config.fit, config.interpolation, config.crop_pct)
