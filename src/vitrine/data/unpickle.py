"""Pickles from strangers: NumPy arrays and plain containers, and nothing else."""

import pickle
from io import BytesIO
from typing import Any

import numpy as np

from vitrine.errors import DataError

ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}
"""What a pickled array of numbers is made with; encode turns text into bytes, no more."""


BROKEN = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError,
          ImportError, OverflowError, MemoryError)  # fmt: skip
"""What the unpickler raises on damaged pickles."""


class ArrayUnpickler(pickle.Unpickler):
    """Refuses every global that an array is not made with."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed global.

        Raises:
            DataError: it is another one.
        """
        if (module, name) not in ALLOWED:
            raise DataError(f"it would run {module}.{name}, which no data file needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_arrays(content: bytes, where: str) -> Any:
    """Return what a pickle of arrays and plain containers holds; text of Python 2 becomes ``str``.

    Raises:
        DataError: it is damaged, or would run code.
    """
    try:
        loaded = ArrayUnpickler(BytesIO(content), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{where}: refused: {error}") from error
    except BROKEN as error:
        raise DataError(f"{where}: damaged: not a whole pickle ({type(error).__name__})") from error
    if any(
        isinstance(value, np.ndarray) and value.dtype.hasobject for value in plain_values(loaded)
    ):
        raise DataError(f"{where}: refused: an array of objects, not of numbers")
    return loaded


def plain_values(loaded: Any) -> list[Any]:
    """Return the values of a dictionary, or nothing."""
    return list(loaded.values()) if isinstance(loaded, dict) else []
