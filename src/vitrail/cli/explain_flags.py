"""Read the flags of ``vitrail explain`` that name methods, layers, heads and patches."""

from typing import cast

from vitrail.errors import ConfigError, nearest
from vitrail.explain.map_settings import (
    ALL,
    METHODS,
    VIEWS,
    MapSettings,
    Method,
    read_variant,
    require_importance,
)


def list_methods(text: str | None) -> list[Method]:
    """Return the methods named by --method, each once; none if it is absent."""
    known = (*METHODS, *VIEWS)
    names: list[Method] = []
    for part in text.split(",") if text is not None else []:
        name = part.strip().replace("-", "_")
        if ":" in name:
            read_variant(name)  # raises if it is invalid
            flags = " ".join(f"--{each.replace('=', ' ')}" for each in name.split(":")[1:])
            raise ConfigError(
                f"--method {name} is a variant, which only --score accepts: give {flags}"
            )
        if name not in (*known, ALL):
            raise ConfigError(
                f"no method {name!r}{nearest(name, known)}: one of {', '.join(known)}, or {ALL}"
            )
        names += METHODS if name == ALL else [cast(Method, name)]
    return list(dict.fromkeys(names))


def list_variants(text: str | None) -> list[Method | MapSettings]:
    """Return the methods to score, and variants such as occlusion:window=1, each once."""
    found: dict[str, Method | MapSettings] = {}
    for part in text.split(",") if text is not None else []:
        if ":" in part:
            settings = read_variant(part)
            found.setdefault(settings.variant, settings)
        else:
            found |= {method: method for method in list_methods(part) if method not in found}
    require_importance(found.values())
    return list(found.values())


def read_numbers(name: str, text: str) -> tuple[int, ...]:
    """Read 2,4-6 as 2, 4, 5, 6."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 9:
            raise ConfigError(f"--{name} is {text!r:.60}: give numbers such as 2, 1,3 or 2-4")
        stop = int(last) if dash else int(first)
        if not 0 <= stop - int(first) <= 1000:
            raise ConfigError(f"--{name} is {text!r:.60}: a range must ascend, by at most 1000")
        numbers += range(int(first), stop + 1)
    return tuple(numbers)


def read_query(text: str) -> tuple[int, int]:
    """Read ROW,COLUMN."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() and len(part) < 9 for part in parts):
        raise ConfigError(f"--query is {text!r:.60}: give ROW,COLUMN of a patch, from 0")
    return int(parts[0]), int(parts[1])
