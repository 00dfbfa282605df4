"""Settings to and from JSON and TOML, checked field by field: such files come from strangers."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitrail.config.fields import shown
from vitrail.config.settings import Config, require
from vitrail.errors import ConfigError, nearest

MOVABLE = (
    "data_path", "num_workers", "device", "tensorboard", "wandb", "mlflow", "attention_epochs",
    "keep_checkpoints",
)  # fmt: skip
"""Settings that a run may change when it goes on: they change no weight."""
LARGEST, LONGEST_LINE = 100_000, 2_000
"""Bytes of a file of settings, and characters of a line of it, at most."""


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
        raise ConfigError(f"settings are a table of sections, not {shown(sections)}")
    base = base or Config()
    changed = {}
    for section, values in sections.items():
        if section not in section_names():
            raise ConfigError(f"unknown section {section!r:.60}{nearest(section, section_names())}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"section {section} is a table of settings, not {shown(values)}")
        changed[section] = replace_fields(getattr(base, section), values)
    return dataclasses.replace(base, **changed)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of settings.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # wrong JSON or UTF-8, a number too long
        raise ConfigError(f"{path}: damaged: {error}") from error


def read_text(path: Path) -> str:
    """Return the text of a file of settings."""
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path}: larger than {LARGEST:,} bytes: not a file of settings")
        return path.read_text(encoding="utf-8-sig")  # Windows' editors write a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def read_toml(path: Path, base: Config) -> Config:
    """Return ``base`` with the settings of a TOML file, in sections or without.

    Raises:
        ConfigError: the file cannot be read, or holds something that is not a setting.
    """
    return from_json(toml_sections(path), base)


def toml_sections(path: Path) -> dict[str, dict[str, Any]]:
    """Return the settings that a TOML file, or a run's config.json, gives, by section.

    Raises:
        ConfigError: the file cannot be read, or holds something that is not a setting.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ConfigError(f"{path}: YAML is not read: give a TOML file, or a run's config.json")
    table = read_json(path) if path.suffix.lower() == ".json" else read_table(path)
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: settings are a table of sections, not {shown(table)}")
    owner = {
        name: section.name
        for section in dataclasses.fields(Config)
        for name in field_names(section.type)
    }
    sections: dict[str, dict[str, Any]] = {}
    for name, value in table.items():
        if name in section_names() and isinstance(value, Mapping):
            sections[name] = {**sections.get(name, {}), **value}
        elif name in owner:
            sections.setdefault(owner[name], {})[name] = value
        else:
            raise ConfigError(f"{path}: unknown setting {name!r:.60}{nearest(name, owner)}")
    return sections


def read_table(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        text = read_text(path)
        # Python's reader takes the square of a dotted key's length.
        require(max(map(len, text.splitlines()), default=0) <= LONGEST_LINE, f"{path}: a line of "
                f"more than {LONGEST_LINE} characters, which no setting needs")  # fmt: skip
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # wrong TOML or UTF-8, a number too long
        raise ConfigError(f"{path}: not TOML: {error}") from error


def section_names() -> list[str]:
    """Return model, data, augment, training, run."""
    return [field.name for field in dataclasses.fields(Config)]


def field_names(section: Any) -> list[str]:
    """Return the names of a section's settings."""
    return [field.name for field in dataclasses.fields(section)]


def replace_fields(section: Any, values: Mapping[str, Any]) -> Any:
    """Return the section with these values; it checks them itself (see fields.Checked)."""
    known = field_names(section)
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r:.60}{nearest(name, known)}")
    return dataclasses.replace(section, **values)
