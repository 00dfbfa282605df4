"""Flags -> dataclasses, by tyro; what is wrong becomes one line."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from vitrail.cli.options import is_model
from vitrail.config.fields import expand_home
from vitrail.errors import ConfigError, nearest

Options = TypeVar("Options")


def parse(
    kind: type[Options], words: Sequence[str], *, prog: str, default: Options | None = None
) -> Options:
    """Return the dataclass that the words describe; ``--help`` prints and exits.

    Raises:
        ConfigError: an unknown flag (the nearest is offered), or a value that does not fit.
    """
    options, unknown = parse_known(kind, words, prog=prog, default=default)
    if unknown:
        word = unknown[0]
        what = "flag" if word.startswith("-") else "word"
        flags = [f"--{name}" for name in field_names(kind)]
        if "--model_path" in flags and is_model(word):
            raise ConfigError(f"{word} is a model: give --model_path {word}")
        hint = nearest(word.partition("=")[0].replace("-", "_").replace("__", "--", 1), flags)
        raise ConfigError(f"unknown {what} {word}{hint}: {prog} --help lists all")
    return options


def parse_known(
    kind: type[Options],
    words: Sequence[str],
    *,
    prog: str,
    default: Options | None = None,
    add_help: bool = True,
) -> tuple[Options, list[str]]:
    """Return the dataclass, and the words that are no flag of it."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options, unknown = tyro.cli(
                kind,
                args=list(words),
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                use_underscores=True,
                return_unknown_args=True,
                add_help=add_help,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(first_sentence(errors.getvalue())) from None
    return with_home(options), unknown


def with_home(options: Any) -> Any:
    """Return the dataclass with ``~`` expanded in its paths, as a shell does for most words only.

    ``--data_path=~/pictures`` reaches the program as it is.
    """
    changed = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            new: Any = with_home(value)
        elif isinstance(value, Path):
            new = expand_home(value)
        elif isinstance(value, tuple) and any(isinstance(item, Path) for item in value):
            new = tuple(expand_home(i) if isinstance(i, Path) else i for i in value)
        else:
            continue
        if new != value:
            changed[field.name] = new
    return dataclasses.replace(options, **changed) if changed else options


def first_sentence(box: str) -> str:
    """Return the message in tyro's error box as one line."""
    lines = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╰╯─ ")
        if not text:
            break
        lines.append(text)
    return " ".join(lines) or "these flags cannot be read"


def field_names(kind: Any) -> Iterator[str]:
    """Yield the names of all fields, also of nested dataclasses."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from field_names(field.type)
        else:
            yield field.name
