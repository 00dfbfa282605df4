"""Untrusted pickles: NumPy arrays of numbers and plain containers, and nothing else.

Nothing is imported, and nothing is called but the functions below: the instructions are read by
``pickletools`` and carried out here. Python's unpickler is not used, even restricted: it allocates
whatever size a file claims, and hashes keys that take forever. Here every number in memory is
backed by as many bytes of the file.
"""

import math
import pickletools
import re
from typing import Any

import numpy as np

from vitrail.errors import DataError

NUMBER = re.compile(r"[<>|=]?[biufc?]\d{0,2}")
"""The codes of NumPy's number types."""
ARRAY = object()
"""Stands for ``numpy.ndarray``, which a pickle only names."""
VALUES = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
))  # fmt: skip
"""Instructions that put their argument on the stack; strings of Python 2 are read as Latin-1."""
CORRUPT = (ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError,
           RuntimeError)  # fmt: skip
"""What carrying out the instructions of a corrupt pickle raises."""


def load_arrays(content: bytes, where: str) -> Any:
    """Return the content of a pickle of arrays and plain containers.

    Raises:
        DataError: it is corrupt, or would run code.
    """
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(content):
            machine.do(instruction.name, argument)
        return machine.stack.pop()
    except DataError as error:
        raise DataError(f"{where}: refused: {error}") from error
    except CORRUPT as error:
        raise DataError(
            f"{where}: corrupt: not a complete pickle ({type(error).__name__})"
        ) from error


class _Machine:
    """The stack machine of pickles, without the instructions that no array needs."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """The stacks below each mark."""
        self.memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in VALUES:
            self.stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("REDUCE", "BUILD", "GLOBAL", "STACK_GLOBAL"):
            self.make(name, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            self.collect(name)

    def make(self, name: str, argument: Any) -> None:
        """Name, call or fill one of the few things that arrays are made of."""
        if name == "GLOBAL":
            self.stack.append(_find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            self.stack.append(_find(*self.pop(2)))
        elif name == "REDUCE":
            function, arguments = self.pop(2)
            if not any(function is known for known in ALLOWED.values()):
                raise ValueError("a call of something else than a function")
            self.stack.append(function(*arguments))
        else:
            target, state = self.pop(2)
            _set_state(target, state)
            self.stack.append(target)

    def collect(self, name: str) -> None:
        """Make or extend a container."""
        if name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
            self.stack.append({"EMPTY_LIST": [], "EMPTY_DICT": {}, "EMPTY_TUPLE": ()}[name])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self.pop(int(name[-1]))))
        elif name in ("LIST", "TUPLE", "DICT"):
            items = self.pop_to_mark()
            kinds: dict[str, Any] = {"LIST": list, "TUPLE": tuple, "DICT": _plain_items}
            self.stack.append(kinds[name](items))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
            _require(type(self.stack[-1]) is list, "an item of something else than a list")
            self.stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.pop_to_mark()
            _require(type(self.stack[-1]) is dict, "an item of something else than a dictionary")
            self.stack[-1].update(_plain_items(items))
        else:
            raise ValueError(f"the instruction {name}, which no array needs")

    def pop(self, count: int) -> list[Any]:
        """Take items from the top of the stack."""
        _require(len(self.stack) >= count, "an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        """Take all items above the latest mark."""
        items, self.stack = self.stack, self.below.pop()
        return items


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _find(module: str, name: str) -> Any:
    """Return the object that an allowed name refers to.

    Raises:
        DataError: it is another name.
    """
    _require(type(module) is type(name) is str, "a name that is not text")
    if f"{module}.{name}" not in ALLOWED:
        raise DataError(f"it would run {module:.50}.{name:.50}, which no data file needs")
    return ALLOWED[f"{module}.{name}"]


def _plain_items(items: list[Any]) -> dict[Any, Any]:
    """Return a dictionary of alternating keys and values; a key is text, bytes or an integer.

    Hashing nested tuples as keys could take forever.
    """
    keys, values = items[::2], items[1::2]
    _require(all(type(key) in (str, bytes, int) for key in keys), "a key that is not plain")
    return dict(zip(keys, values, strict=True))


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Return text as bytes: how Python 3 writes bytes in the protocols of Python 2."""
    _require(encoding == "latin1", "bytes in another encoding")
    return text.encode("latin1")


def _number_type(code: str, _align: object = False, _copy: object = True) -> np.dtype[Any]:
    """Return a new object of one of NumPy's number types: its byte order is set later."""
    valid = isinstance(code, str) and NUMBER.fullmatch(code)
    _require(bool(valid), "an array of something else than numbers")
    return np.dtype(code, align=False, copy=True)


def _begin_array(kind: object, _shape: object, _code: object) -> np.ndarray:
    """Return an empty array, whose shape, type and content are set later."""
    _require(kind is ARRAY, "not an array")
    return np.empty(0, np.uint8)


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """Make an array of bytes, as NumPy does from protocol 5 on."""
    _require_size(buffer, dtype, shape)
    return np.frombuffer(buffer, dtype).reshape(shape, order="F" if order == "F" else "C")


def _set_state(target: Any, state: Any) -> None:
    """Set the shape, type and bytes of an array, or the byte order of a number type."""
    if isinstance(target, np.ndarray):
        _, shape, dtype, columns_first, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        _require_size(content, dtype, shape)
        complete: Any = (1, shape, dtype, bool(columns_first), bytes(content))
        target.__setstate__(complete)
    elif isinstance(target, np.dtype) and state[1] in ("<", ">", "|", "="):
        target.__setstate__((3, state[1], None, None, None, -1, -1, 0))  # type: ignore[attr-defined]
    else:
        raise ValueError("a state of something that has none")


def _require_size(content: Any, dtype: Any, shape: Any) -> None:
    """Refuse a shape that does not match the number of bytes."""
    valid = (
        isinstance(content, bytes | bytearray)
        and isinstance(dtype, np.dtype)
        and dtype.itemsize > 0
        and isinstance(shape, tuple)
        and all(type(side) is int and side >= 0 for side in shape)
        and math.prod(shape) * dtype.itemsize == len(content)
    )
    _require(valid, "an array whose shape does not match its bytes")


ALLOWED: dict[str, Any] = {
    "numpy.dtype": _number_type,
    "numpy.ndarray": ARRAY,
    "numpy.core.multiarray._reconstruct": _begin_array,
    "numpy._core.multiarray._reconstruct": _begin_array,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "numpy._core.numeric._frombuffer": _array_from_buffer,
    "_codecs.encode": _encode_latin1,
}
"""What pickled arrays are made with, by NumPy 1 (``core``) and 2 (``_core``)."""
