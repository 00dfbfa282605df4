"""How maps are drawn."""

from dataclasses import dataclass
from typing import Literal

from vitrail.config.files import Checked
from vitrail.config.settings import require_range

Normalization = Literal["frame", "picture", "none"]
Colormap = Literal["magma", "inferno", "plasma", "viridis", "cividis"]
"""All perceptually uniform; cividis looks the same with every kind of color vision."""


@dataclass(frozen=True)
class Look(Checked):
    """How maps of what a model looked at are drawn."""

    style: Literal["vitrail", "reference"] = "vitrail"
    """reference: as in the reference implementation, the picture dimmed by its rollout."""
    normalize: Normalization = "frame"
    """Scale of the maps: separate for each (frame), one for all (picture), or unscaled (none)."""
    theme: Literal["light", "dark"] = "light"
    """Black text on white (light), or white on black (dark)."""
    colormap: Colormap = "magma"
    """Colors of the values. All color maps are perceptually uniform."""
    alpha: float = 0.6
    """Opacity of the map over the picture, 0 to 1."""
    duration: int = 500
    """Milliseconds per map in an animation; the last one is shown four times as long."""
    loop: int = 0
    """Number of times an animation repeats; 0 means forever."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "alpha", 0, 1)
