"""Pickles from strangers: NumPy arrays and plain containers, and nothing else."""

import pickle
from io import BytesIO
from typing import Any

import numpy as np

from vitrine.errors import DataError


def encode_latin1(text: str, encoding: str) -> bytes:
    """Make bytes of text, as Python 3 writes bytes in the protocols of Python 2."""
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode(encoding)


RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
FROM_BUFFER: Any = np.empty(0).__reduce_ex__(5)[0]
"""What NumPy itself writes into a pickle to make the array again, up to protocol 4 and from 5."""
ALLOWED: dict[str, Any] = {
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    "numpy.core.multiarray._reconstruct": RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": RECONSTRUCT,
    "numpy.core.numeric._frombuffer": FROM_BUFFER,
    "numpy._core.numeric._frombuffer": FROM_BUFFER,
    "_codecs.encode": encode_latin1,
}
"""What pickled arrays are made with, by NumPy 1 (``core``) and 2 (``_core``)."""
BROKEN = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError,
          OverflowError, MemoryError)  # fmt: skip
"""What the unpickler raises on damaged pickles."""


class ArrayUnpickler(pickle.Unpickler):
    """Refuses every global that an array is not made with; nothing is ever imported."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed global.

        Raises:
            DataError: it is another one.
        """
        if f"{module}.{name}" not in ALLOWED:
            raise DataError(f"it would run {module}.{name}, which no data file needs")
        return ALLOWED[f"{module}.{name}"]


def load_arrays(content: bytes, where: str) -> Any:
    """Return what a pickle of arrays and plain containers holds; text of Python 2 becomes ``str``.

    Raises:
        DataError: it is damaged, or would run code.
    """
    try:
        return ArrayUnpickler(BytesIO(content), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{where}: refused: {error}") from error
    except BROKEN as error:
        raise DataError(f"{where}: damaged: not a whole pickle ({type(error).__name__})") from error
