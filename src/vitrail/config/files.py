"""Settings from Python, flags, JSON and TOML: one set of rules checks and converts every value."""

import contextlib
import dataclasses
import json
import os
import tomllib
import types
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from vitrail.errors import ConfigError, nearest

if TYPE_CHECKING:
    from vitrail.config.settings import Config

RESUME_OVERRIDES = (
    "data_path", "num_workers", "device", "tensorboard", "wandb", "mlflow", "attention_epochs",
    "keep_checkpoints",
)  # fmt: skip
"""Settings that may change when a run is resumed: they do not affect the weights."""
NAMES = {int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
"""What users call the types of settings; all others are text."""


class Checked:
    """Base of a frozen dataclass that checks its values whenever it is built.

    Raises:
        ConfigError: a value has the wrong type or is not one of the choices.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, convert(name, getattr(self, name), hint))


def convert(name: str, value: Any, hint: Any) -> Any:
    """Return the value of the field ``name`` converted to its declared type, or refuse it."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, Integral) and abs(int(value)) >= 2**63:
        raise ConfigError(f"{name} has more than 63 bits: give a smaller number")
    if isinstance(value, str) and not _is_file_text(value):
        raise ConfigError(f"{name} is {value!r:.60}: it has characters that no file name can have")
    for option in options:
        with contextlib.suppress(TypeError):
            return _as_type(name, value, option)
    wanted = " or ".join(_describe(option) for option in options)
    raise ConfigError(f"{name} is {value!r:.60}: give {wanted}")


def _as_type(name: str, value: Any, option: Any) -> Any:
    """Return a value converted to a type, or raise TypeError if it does not fit."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    kinds = get_args(option)
    if get_origin(option) is Literal and isinstance(value, str) and value in kinds:
        return value
    if get_origin(option) is tuple and isinstance(value, list | tuple):
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(value) == len(kinds):
            return tuple(convert(name, v, kind) for v, kind in zip(value, kinds, strict=True))
    if option is Path and isinstance(value, str | Path):
        return expand_home(value)
    if option is float and number:
        return float(value)
    if option is int and number and isinstance(value, Integral):
        return int(value)
    if type(value) is option:
        return value
    raise TypeError


def expand_home(path: str | Path) -> Path:
    """Return a path with a leading ``~`` replaced by the home folder, if there is one."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (pathlib raises if there is none)


def _is_file_text(text: str) -> bool:
    """Return whether the system accepts a text as (part of) a file name."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _describe(option: Any) -> str:
    """Describe a type to a user."""
    if get_origin(option) is Literal:
        return ", ".join(map(repr, get_args(option)))
    if get_origin(option) is tuple:
        kinds = get_args(option)
        return "a list of numbers" if kinds[-1] is Ellipsis else f"a list of {len(kinds)} numbers"
    return NAMES.get(option, "text")


def to_json(config: "Config") -> dict[str, dict[str, Any]]:
    """Return the settings as plain JSON values, by section."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def from_json(sections: Any, base: "Config | None" = None) -> "Config":
    """Return ``base`` (default: ``Config()``) with some settings (as from ``to_json``) replaced.

    Raises:
        ConfigError: an unknown section or setting, or a value of the wrong type or range.
    """
    base = base or _defaults()
    changed = {}
    for section, values in _require_table(sections, "settings").items():
        if section not in vars(base):
            raise ConfigError(f"unknown section {section!r:.60}{nearest(section, vars(base))}")
        _require_table(values, f"section {section}")
        changed[section] = replace_fields(getattr(base, section), values)
    return dataclasses.replace(base, **changed)


def replace_fields(section: Any, values: Mapping[str, Any]) -> Any:
    """Return a section with some values replaced and checked."""
    for name in values:
        if name not in vars(section):
            raise ConfigError(f"unknown setting {name!r:.60}{nearest(name, vars(section))}")
    return dataclasses.replace(section, **values)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of settings."""
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or too long a number
        raise ConfigError(f"{path}: invalid JSON: {error}") from error


def read_toml(path: Path, base: "Config") -> "Config":
    """Return ``base`` with the settings of a TOML file, in sections or without."""
    return from_json(toml_sections(path), base)


def toml_sections(path: Path) -> dict[str, dict[str, Any]]:
    """Return the settings in a TOML file, or in a run's config.json, by section.

    Raises:
        ConfigError: the file cannot be read, or has an unknown setting.
    """
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        raise ConfigError(f"{path}: YAML is not supported: give a TOML file or a run's config.json")
    try:
        table = read_json(path) if suffix == ".json" else tomllib.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # invalid TOML or UTF-8, or too long a number
        raise ConfigError(f"{path}: invalid TOML: {error}") from error
    return by_section(_require_table(table, f"{path}: settings"), str(path))


def by_section(table: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Return settings by section; they are given by name or already in sections.

    Raises:
        ConfigError: there is no such setting.
    """
    section_of = {
        name: section for section, values in vars(_defaults()).items() for name in vars(values)
    }
    sections: dict[str, dict[str, Any]] = {}
    for name, value in table.items():
        if name in section_of.values() and isinstance(value, Mapping):
            sections[name] = {**sections.get(name, {}), **value}
        elif name in section_of:
            sections.setdefault(section_of[name], {})[name] = value
        else:
            raise ConfigError(f"{where}: unknown setting {name!r:.60}{nearest(name, section_of)}")
    return sections


def _defaults() -> "Config":
    from vitrail.config.settings import Config  # it imports this module

    return Config()


def _require_table(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must be a table, not {value!r:.60}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows' editors write a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
