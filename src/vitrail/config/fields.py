"""Check the values of a dataclass's fields against their declared types, and convert them.

The same rules hold for settings from Python, flags, JSON and TOML.
"""

import os
import types
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitrail.errors import ConfigError


class Checked:
    """Base of a frozen dataclass that checks its values whenever it is built.

    Raises:
        ConfigError: a value has the wrong type or is not one of the choices.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, convert(name, getattr(self, name), hint))


def convert(name: str, value: Any, hint: Any) -> Any:
    """Return the value converted to the declared type ``hint`` of the field ``name``.

    Raises:
        ConfigError: it has the wrong type or is not one of the choices.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, Integral) and abs(int(value)) >= 2**63:
        raise ConfigError(f"{name} has more than 63 bits: give a smaller number")
    if isinstance(value, str) and not _is_file_text(value):
        raise ConfigError(f"{name} is {value!r:.60}: it contains characters that no file name can")
    for option in options:
        found, converted = _as_type(name, value, option)
        if found:
            return converted
    wanted = " or ".join(_describe(option) for option in options)
    raise ConfigError(f"{name} is {shown(value)}: give {wanted}")


def _as_type(name: str, value: Any, option: Any) -> tuple[bool, Any]:
    """Return whether a value has this type, and if so, the value converted to it."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if get_origin(option) is Literal:
        return isinstance(value, str) and value in get_args(option), value
    if get_origin(option) is tuple:
        kinds = get_args(option)
        if not isinstance(value, list | tuple):
            return False, None
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(value) != len(kinds):
            return False, None
        return True, tuple(convert(name, v, kind) for v, kind in zip(value, kinds, strict=True))
    if option is Path and isinstance(value, str | Path):
        return True, expand_home(value)
    if option is float and number:
        return True, float(value)
    if option is int and number and isinstance(value, Integral):
        return True, int(value)
    return type(value) is option, value


def expand_home(path: str | Path) -> Path:
    """Return a path with a leading ``~`` replaced by the home folder, if there is one."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib raises if there is none)


def _is_file_text(text: str) -> bool:
    """Return whether the system accepts a text as (part of) a file name."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def shown(value: Any) -> str:
    """Return a value's repr, shortened, for a message."""
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):  # too long a number, too many brackets
        return f"a {type(value).__name__} that is too large"


def _describe(option: Any) -> str:
    """Describe a type to a user."""
    if get_origin(option) is Literal:
        return ", ".join(map(repr, get_args(option)))
    if get_origin(option) is tuple:
        kinds = get_args(option)
        return "a list of numbers" if kinds[-1] is Ellipsis else f"a list of {len(kinds)} numbers"
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
    return names.get(option, "text")
