"""Pickles from strangers: NumPy arrays of numbers and plain containers, and nothing else.

Nothing is imported, and nothing is called but the functions below. Python's own unpickler serves,
not the one in C: that one reserves memory for whatever a file claims to hold, and hashes keys that
take for ever. No memory is taken for a number that is not backed by as many bytes.
"""

import math
import pickle
import platform
import re
import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any, ClassVar

import numpy as np

from vitrail.errors import DataError

NUMBER = re.compile(r"[<>|=]?[biufc?]\d{0,2}")
"""The codes of NumPy's numbers."""
ARRAY = object()
"""Stands for ``numpy.ndarray``, which a pickle only names."""
BROKEN = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError,
          OverflowError, MemoryError, AssertionError, RuntimeError, struct.error)  # fmt: skip
"""What the unpickler raises on damaged pickles."""


def encode_latin1(text: str, encoding: str) -> bytes:
    """Make bytes of text, as Python 3 writes bytes in the protocols of Python 2."""
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode(encoding)


def number_type(code: str, _align: object = False, _copy: object = True) -> np.dtype[Any]:
    """Return one of NumPy's number types, not shared with anybody: its byte order is set later."""
    if not (isinstance(code, str) and NUMBER.fullmatch(code)):
        raise ValueError("an array of something else than numbers")
    return np.dtype(code, align=False, copy=True)


def begin_array(kind: object, _shape: object, _code: object) -> np.ndarray:
    """Return an empty array, which ``fill_array`` makes what it shall be."""
    if kind is not ARRAY:
        raise ValueError("no array")
    return np.empty(0, np.uint8)


def fill_array(array: np.ndarray, state: Any) -> None:
    """Set shape, type and bytes of an array, if they agree."""
    _, shape, dtype, columns_first, content = state
    content = content.encode("latin1") if isinstance(content, str) else content
    check_size(content, dtype, shape)
    whole: Any = (1, shape, dtype, bool(columns_first), bytes(content))
    array.__setstate__(whole)


def array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """Make an array of bytes, as NumPy does from protocol 5 on."""
    check_size(buffer, dtype, shape)
    return np.frombuffer(buffer, dtype).reshape(shape, order="F" if order == "F" else "C")


def check_size(content: Any, dtype: Any, shape: Any) -> None:
    """Refuse a shape that its bytes do not fill."""
    sound = (
        isinstance(content, bytes | bytearray)
        and isinstance(dtype, np.dtype)
        and dtype.itemsize > 0
        and isinstance(shape, tuple)
        and all(type(side) is int and side >= 0 for side in shape)
        and math.prod(shape) * dtype.itemsize == len(content)
    )
    if not sound:
        raise ValueError("an array whose shape and bytes do not agree")


ALLOWED: dict[str, Any] = {
    "numpy.dtype": number_type,
    "numpy.ndarray": ARRAY,
    "numpy.core.multiarray._reconstruct": begin_array,
    "numpy._core.multiarray._reconstruct": begin_array,
    "numpy.core.numeric._frombuffer": array_from_buffer,
    "numpy._core.numeric._frombuffer": array_from_buffer,
    "_codecs.encode": encode_latin1,
}
"""What pickled arrays are made with, by NumPy 1 (``core``) and 2 (``_core``)."""
UNNEEDED = (
    pickle.INST + pickle.OBJ + pickle.NEWOBJ + pickle.NEWOBJ_EX + pickle.EXT1 + pickle.EXT2
    + pickle.EXT4 + pickle.PERSID + pickle.BINPERSID + pickle.EMPTY_SET + pickle.FROZENSET
    + pickle.ADDITEMS + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER
)  # fmt: skip
"""Instructions that no array needs: objects of other classes, sets, and bytes from elsewhere."""


PythonUnpickler: Any = getattr(pickle, "_Unpickler", None)
"""Python's own unpickler. Its name is private, so another Python may lack it."""


class ArrayUnpickler(PythonUnpickler or object):  # type: ignore[misc]
    """Refuses every global that an array is not made with; nothing is ever imported."""

    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in getattr(PythonUnpickler, "dispatch", {}).items()
        if code not in UNNEEDED
    }
    stack: list[Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed global.

        Raises:
            DataError: it is another one.
        """
        if f"{module}.{name}" not in ALLOWED:
            raise DataError(f"it would run {module}.{name}, which no data file needs")
        return ALLOWED[f"{module}.{name}"]

    def load_global(self) -> None:
        """Put a global on the stack whose two names are whole lines."""
        module, name = self.readline(), self.readline()
        if not name.endswith(b"\n"):
            raise EOFError
        self.stack.append(self.find_class(module[:-1].decode(), name[:-1].decode()))

    def load_reduce(self) -> None:
        """Call one of the functions above, and never anything else."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not any(function is known for known in ALLOWED.values()):
            raise ValueError("a call of what is no function")
        self.stack.append(function(*arguments))

    def load_build(self) -> None:
        """Set the state of an array or of its type, and of nothing else."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.ndarray):
            fill_array(target, state)
        elif isinstance(target, np.dtype) and state[1] in ("<", ">", "|", "="):
            target.__setstate__((3, state[1], None, None, None, -1, -1, 0))  # type: ignore[attr-defined]
        else:
            raise ValueError("a state of what has none")

    def load_dict(self) -> None:
        """Make a dictionary of what lies on the stack."""
        items = self.pop_mark()
        self.stack.append(plain_items(items))

    def load_setitem(self) -> None:
        """Add one item to a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        update(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        """Add items to a dictionary."""
        items = self.pop_mark()
        update(self.stack[-1], items)

    def load_append(self) -> None:
        """Add one item to a list."""
        value = self.stack.pop()
        extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        """Add items to a list."""
        items = self.pop_mark()
        extend(self.stack[-1], items)

    def load_bytearray8(self) -> None:
        """Read bytes, as many as there are."""
        length = int.from_bytes(self.read(8), "little")
        self.stack.append(bytearray(self.read(length)))

    dispatch |= {
        pickle.GLOBAL[0]: load_global,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def plain_items(items: list[Any]) -> dict[Any, Any]:
    """Return a dictionary of keys and values in turn; a key is text, bytes or a whole number.

    Nested tuples as keys could take for ever to be hashed.
    """
    keys, values = items[::2], items[1::2]
    if not all(type(key) in (str, bytes, int) for key in keys):
        raise ValueError("a key that is neither text nor a number")
    return dict(zip(keys, values, strict=True))


def update(target: Any, items: list[Any]) -> None:
    """Add keys and values in turn to a dictionary."""
    if type(target) is not dict:
        raise ValueError("an item of what is no dictionary")
    target.update(plain_items(items))


def extend(target: Any, items: list[Any]) -> None:
    """Add items to a list."""
    if type(target) is not list:
        raise ValueError("an item of what is no list")
    target.extend(items)


def load_arrays(content: bytes, where: str) -> Any:
    """Return what a pickle of arrays and plain containers holds; text of Python 2 becomes ``str``.

    Raises:
        DataError: it is damaged, or would run code, or this Python has no unpickler of its own.
    """
    if PythonUnpickler is None:
        raise DataError(
            f"{where}: this Python ({platform.python_version()}) lacks pickle._Unpickler, which "
            "reads such files safely: use Python 3.11, 3.12 or 3.13"
        )
    try:
        return ArrayUnpickler(BytesIO(content), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{where}: refused: {error}") from error
    except BROKEN as error:
        raise DataError(f"{where}: damaged: not a whole pickle ({type(error).__name__})") from error
