"""The exceptions Vitrine raises itself.

    VitrineError                 anything below; str(error) is one line for the user
    ├── ConfigError              a setting that cannot be: what, its value, the remedy
    ├── DataError                data missing, damaged or not what they claim to be
    │   └── PictureError         one picture file that cannot be read
    ├── CheckpointError          weights missing, truncated, altered or foreign
    ├── OutputError              a folder that cannot be written
    ├── TrainingError            training cannot go on (a loss that is not finite)
    └── BenchError               a measurement that could not be made

The library raises these; only the command line turns them into words and exit codes.
"""

import difflib
from collections.abc import Iterable


class VitrineError(Exception):
    """Base of all of Vitrine's own exceptions."""


class ConfigError(VitrineError):
    """A setting that cannot be."""


class DataError(VitrineError):
    """Data that are missing, damaged or not what they claim to be."""


class PictureError(DataError):
    """One picture file that cannot be read."""


class CheckpointError(VitrineError):
    """Weights that are missing, truncated, altered or foreign."""


class OutputError(VitrineError):
    """A folder or file that cannot be written."""


class TrainingError(VitrineError):
    """Training that cannot go on."""


class BenchError(VitrineError):
    """A measurement that could not be made."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word nearest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
