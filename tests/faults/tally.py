"""How often a fault was tried, and what was lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vitrail.errors import VitrailError


@dataclass
class Tally:
    """The figures of one fault."""

    fault: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why it could not be tried here."""

    @property
    def survived(self) -> int:
        """Tries in which nothing was lost."""
        return self.tried - len(self.lost)

    @contextmanager
    def trial(self, what: str) -> Iterator[None]:
        """Count one try; a failed assertion or a VitrailError inside is a loss."""
        self.tried += 1
        try:
            yield
        except (AssertionError, VitrailError) as error:
            self.lost.append(f"{what}: {error}")
