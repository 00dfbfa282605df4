"""Flags -> dataclasses, by tyro; a mistake becomes a message of one line."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from vitrail.cli.options import is_model
from vitrail.config.files import expand_home
from vitrail.errors import ConfigError, nearest

Options = TypeVar("Options")
REGISTRY = ConstructorRegistry()
"""Makes the help of flags shorter: it leaves out None, which nobody has to write."""
_entered: list[Any] = []
"""The dataclasses whose fields are being read."""


def parse(
    kind: type[Options], args: Sequence[str], *, prog: str, default: Options | None = None
) -> Options:
    """Return the dataclass that the arguments describe; ``--help`` prints and exits.

    Raises:
        ConfigError: an unknown flag (the nearest is offered), or a value that does not fit.
    """
    options, unknown = parse_known(kind, args, prog=prog, default=default)
    if unknown:
        arg = unknown[0]
        what = "flag" if arg.startswith("-") else "argument"
        flags = [f"--{name}" for name in _field_names(kind)]
        if "--model_path" in flags and is_model(arg):
            raise ConfigError(f"{arg} is a model: give --model_path {arg}")
        hint = nearest(arg.partition("=")[0].replace("-", "_").replace("__", "--", 1), flags)
        raise ConfigError(f"unknown {what} {arg}{hint}: {prog} --help lists all")
    return options


def parse_known(
    kind: type[Options],
    args: Sequence[str],
    *,
    prog: str,
    default: Options | None = None,
    add_help: bool = True,
) -> tuple[Options, list[str]]:
    """Return the dataclass, and the arguments that it does not know."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options, unknown = tyro.cli(
                kind,
                args=list(args),
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                use_underscores=True,
                return_unknown_args=True,
                add_help=add_help,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=REGISTRY,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_first_sentence(errors.getvalue())) from None
    return _with_home(options), unknown


@REGISTRY.struct_rule
def _show_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return a dataclass as tyro reads it, with better help for each field."""
    if not dataclasses.is_dataclass(info.type) or info.type in _entered:
        return None
    _entered.append(info.type)
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
    finally:
        _entered.pop()
    if not isinstance(spec, StructConstructorSpec):
        return None
    return dataclasses.replace(spec, fields=tuple(map(_show_field, spec.fields)))


def _show_field(field: StructFieldSpec) -> StructFieldSpec:
    """Return a field whose help shows neither the value None nor an empty default."""
    if dataclasses.is_dataclass(field.default):
        return field
    kind, *annotations = (
        get_args(field.type) if get_origin(field.type) is Annotated else (field.type,)
    )
    metavar = None
    if NoneType in get_args(kind):
        kinds = tuple(each for each in get_args(kind) if each is not NoneType)
        others: Any = Union[kinds]  # noqa: UP007 (of a tuple)
        primitive = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(others, set()))
        metavar = getattr(primitive, "metavar", None)
    shown = tyro.conf.arg(metavar=metavar, help_behavior_hint=_show_default)
    annotated: Any = Annotated[(kind, shown, *annotations)]
    text = partial(_one_paragraph, field.helptext)
    return dataclasses.replace(field, type=annotated, helptext=text)


def _one_paragraph(text: Any) -> str | None:
    """Return a field's docstring without its line breaks."""
    text = text() if callable(text) else text
    return " ".join(text.split()) if text else None


def _show_default(default: str) -> str:
    """Return a default as the help shows it, if there is one."""
    return "" if default in ("None", "", "''") else f"(default: {default})"


def _with_home(options: Any) -> Any:
    """Return the dataclass with ``~`` expanded in its paths, as a shell does for most of them.

    ``--data_path=~/pictures`` reaches the program as it is.
    """
    changed = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            new: Any = _with_home(value)
        elif isinstance(value, Path):
            new = expand_home(value)
        elif isinstance(value, tuple) and any(isinstance(item, Path) for item in value):
            new = tuple(expand_home(i) if isinstance(i, Path) else i for i in value)
        else:
            continue
        if new != value:
            changed[field.name] = new
    return dataclasses.replace(options, **changed) if changed else options


def _first_sentence(box: str) -> str:
    """Return the message in tyro's error box as one line, without the choice None."""
    lines = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╰╯─ ")
        if not text:
            break
        lines.append(text)
    text = re.sub(r"\{None\}\||'None', |, 'None'", "", " ".join(lines))
    return text or "these flags cannot be read"


def _field_names(kind: Any) -> Iterator[str]:
    """Yield the names of all fields, also of nested dataclasses."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from _field_names(field.type)
        else:
            yield field.name
