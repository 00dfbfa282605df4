"""Flags -> dataclasses, with tyro; a mistake becomes a one-line message."""

import contextlib
import dataclasses
import inspect
import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from vitrail.cli.options import is_model
from vitrail.config.files import expand_home
from vitrail.config.settings import DataConfig, Preparation
from vitrail.errors import ConfigError, nearest

Options = TypeVar("Options")
REGISTRY = ConstructorRegistry()
"""Makes the help of flags shorter: it leaves out None, which nobody has to write."""
EXAMPLES = "\nFor example:"
"""What the examples in the docstring of a command's options begin with."""
_entered: list[Any] = []
"""The dataclasses whose fields are being read."""


def parse(
    kind: type[Options], args: Sequence[str], *, prog: str, default: Options | None = None
) -> Options:
    """Return the dataclass that the arguments describe; ``--help`` prints and exits.

    Raises:
        ConfigError: an unknown flag (the message suggests the nearest), or an invalid value.
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
    """Return the dataclass, and the unknown arguments.

    ``--help`` prints the docstring's examples last, where a terminal shows them.
    """
    errors = io.StringIO()
    about, example, examples = (inspect.getdoc(kind) or "").partition(EXAMPLES)
    try:
        with contextlib.redirect_stderr(errors):
            options, unknown = tyro.cli(
                kind,
                args=list(args),
                prog=prog,
                description=about.strip(),
                default=tyro.MISSING_NONPROP if default is None else default,
                use_underscores=True,
                return_unknown_args=True,
                add_help=add_help,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=REGISTRY,
            )
    except SystemExit as stop:
        if not stop.code:
            if examples:
                print(example.strip() + examples)
            raise
        raise ConfigError(_first_sentence(errors.getvalue())) from None
    return options, unknown


@REGISTRY.primitive_rule
def _read_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Expand ``~`` in paths; shells do not expand it in ``--data_path=~/pictures``."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda args: expand_home(args[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


@REGISTRY.struct_rule
def _show_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return a dataclass (or Preparation) as tyro reads it, with better help for each field."""
    known = dataclasses.is_dataclass(info.type) or info.type is Preparation
    if not known or info.type in _entered:
        return None
    _entered.append(info.type)
    try:
        spec = ConstructorRegistry.get_struct_spec(info)
        texts = _texts_of_data() if info.type is Preparation else {}
    finally:
        _entered.pop()
    if not isinstance(spec, StructConstructorSpec):
        return None
    fields = (_show_field(field, texts.get(field.name, field.helptext)) for field in spec.fields)
    return dataclasses.replace(spec, fields=tuple(fields))


def _texts_of_data() -> dict[str, str]:
    """Return the help of DataConfig's fields, for a model that already has values for them."""
    spec = ConstructorRegistry.get_struct_spec(StructTypeInfo.make(DataConfig, None, False))
    assert isinstance(spec, StructConstructorSpec)
    texts = {field.name: _one_paragraph(field.helptext) or "" for field in spec.fields}
    end = " Default: from the weights."
    return {name: text.partition(" Default:")[0] + end for name, text in texts.items()}


def _show_field(field: StructFieldSpec, text: Any) -> StructFieldSpec:
    """Return a field whose help shows neither the value None nor an empty default."""
    if dataclasses.is_dataclass(field.default):
        return field
    kind, *annotations = (
        get_args(field.type) if get_origin(field.type) is Annotated else (field.type,)
    )
    kinds = tuple(each for each in get_args(kind) if each is not NoneType)
    metavar = None
    if get_origin(kind) in (Union, UnionType):
        others: Any = Union[kinds]  # noqa: UP007 (of a tuple)
        primitive = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(others, set()))
        # For one number or two, INT|{INT INT} is hard to read.
        metavar = re.sub(r"^(\w+)\|\{\1 \1\}$", r"\1 [\1]", getattr(primitive, "metavar", ""))
    shown = tyro.conf.arg(metavar=metavar or None, help_behavior_hint=_show_default)
    annotated: Any = Annotated[(kind, shown, *annotations)]
    return dataclasses.replace(field, type=annotated, helptext=partial(_one_paragraph, text))


def _one_paragraph(text: Any) -> str | None:
    """Return a field's docstring without its line breaks."""
    text = text() if callable(text) else text
    return " ".join(text.split()) if text else None


def _show_default(default: str) -> str:
    """Return a default as the help shows it, if there is one."""
    return "" if default in ("None", "", "''") else f"(default: {default})"


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
    """Yield the names of all fields, also of nested groups of flags."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) or is_typeddict(hint):
            yield from _field_names(hint)
        else:
            yield name
