"""Settings to and from JSON and TOML, checked field by field: such files come from strangers."""

import dataclasses
import json
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitrine.config import Config
from vitrine.errors import ConfigError, nearest


def to_json(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings as plain JSON values, by section."""
    text = json.dumps(dataclasses.asdict(config), default=str)
    return dict(json.loads(text))


def from_json(sections: Any, base: Config | None = None) -> Config:
    """Return the settings of to_json(), or ``base`` with those that are given.

    Raises:
        ConfigError: an unknown section or field, or a value of the wrong type or range.
    """
    if not isinstance(sections, Mapping):
        raise ConfigError(f"settings are a table of sections, not {sections!r:.60}")
    base = base or Config()
    changed = {}
    for section, values in sections.items():
        if section not in section_names():
            raise ConfigError(f"unknown section {section!r}{nearest(section, section_names())}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"section {section} is a table of settings, not {values!r:.60}")
        changed[section] = replace_fields(getattr(base, section), values)
    return dataclasses.replace(base, **changed)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of settings.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged: {error}") from error


def read_toml(path: Path, base: Config) -> Config:
    """Return ``base`` with the settings of a TOML file, in sections or without.

    Raises:
        ConfigError: the file cannot be read, or holds something that is not a setting.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    owner = {
        name: section for section in section_names() for name in field_names(getattr(base, section))
    }
    sections: dict[str, Any] = {}
    for name, value in table.items():
        if name in section_names() and isinstance(value, Mapping):
            sections[name] = {**sections.get(name, {}), **value}
        elif name in owner:
            sections.setdefault(owner[name], {})[name] = value
        else:
            raise ConfigError(f"{path}: unknown setting {name!r}{nearest(name, owner)}")
    return from_json(sections, base)


def section_names() -> list[str]:
    """Return model, data, augment, training, run."""
    return [field.name for field in dataclasses.fields(Config)]


def field_names(section: Any) -> list[str]:
    """Return the names of a section's settings."""
    return [field.name for field in dataclasses.fields(section)]


def replace_fields(section: Any, values: Mapping[str, Any]) -> Any:
    """Return the section with these values, each checked against its field's type."""
    hints = get_type_hints(type(section))
    converted = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"unknown setting {name!r}{nearest(name, hints)}")
        converted[name] = convert(name, value, hints[name])
    return dataclasses.replace(section, **converted)


def convert(name: str, value: Any, hint: Any) -> Any:
    """Return the value as the type a field wants, or refuse it."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        origin = get_origin(option)
        if origin is Literal and value in get_args(option) and isinstance(value, str):
            return value
        if origin is tuple and isinstance(value, list | tuple):
            kinds = get_args(option)
            if kinds[-1] is Ellipsis:
                kinds = (kinds[0],) * len(value)
            if len(value) == len(kinds):
                pairs = zip(value, kinds, strict=True)
                return tuple(convert(name, item, kind) for item, kind in pairs)
        if option is type(None) and value is None:
            return value
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and type(value) in (int, float):
            return float(value)
        if isinstance(option, type) and type(value) is option:
            return value
    wanted = " or ".join(describe(option) for option in options)
    raise ConfigError(f"{name} is {value!r:.60}: give {wanted}")


def describe(option: Any) -> str:
    """Name a type as a user would."""
    if get_origin(option) is Literal:
        return ", ".join(map(repr, get_args(option)))
    if get_origin(option) is tuple:
        kinds = get_args(option)
        return "a list of numbers" if kinds[-1] is Ellipsis else f"a list of {len(kinds)} numbers"
    names = {int: "a whole number", float: "a number", bool: "true or false", type(None): "nothing"}
    return names.get(option, "text")
