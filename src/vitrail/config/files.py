"""Settings to and from JSON and TOML. Every value is checked: such files may come from anywhere."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitrail.config.fields import shown
from vitrail.config.settings import Config
from vitrail.errors import ConfigError, nearest

RESUME_OVERRIDES = (
    "data_path", "num_workers", "device", "tensorboard", "wandb", "mlflow", "attention_epochs",
    "keep_checkpoints",
)  # fmt: skip
"""Settings that may change when a run is resumed: they do not affect the weights."""
MAX_BYTES = 20_000
"""Largest settings file. In larger ones, tomllib can take minutes for one dotted key."""


def to_json(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings as plain JSON values, by section."""
    text = json.dumps(dataclasses.asdict(config), default=str)
    return dict(json.loads(text))


def from_json(sections: Any, base: Config | None = None) -> Config:
    """Return ``base`` (default: ``Config()``) with the settings given as by ``to_json``.

    Raises:
        ConfigError: an unknown section or setting, or a value of the wrong type or range.
    """
    if not isinstance(sections, Mapping):
        raise ConfigError(f"settings must be a table of sections, not {shown(sections)}")
    base = base or Config()
    changed, known = {}, _names(Config)
    for section, values in sections.items():
        if section not in known:
            raise ConfigError(f"unknown section {section!r:.60}{nearest(section, known)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"section {section} must be a table of settings, not {shown(values)}")
        changed[section] = replace_fields(getattr(base, section), values)
    return dataclasses.replace(base, **changed)


def replace_fields(section: Any, values: Mapping[str, Any]) -> Any:
    """Return a section with some values replaced; it checks them (see fields.Checked).

    Raises:
        ConfigError: an unknown setting, or a value of the wrong type or range.
    """
    known = _names(section)
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r:.60}{nearest(name, known)}")
    return dataclasses.replace(section, **values)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of settings.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or too long a number
        raise ConfigError(f"{path}: invalid JSON: {error}") from error


def read_toml(path: Path, base: Config) -> Config:
    """Return ``base`` with the settings of a TOML file, in sections or without.

    Raises:
        ConfigError: the file cannot be read, or has an unknown setting or a wrong value.
    """
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
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: settings must be a table of sections, not {shown(table)}")
    section_of = {
        name: section.name
        for section in dataclasses.fields(Config)
        for name in _names(section.type)
    }
    sections: dict[str, dict[str, Any]] = {}
    for name, value in table.items():
        if name in section_of.values() and isinstance(value, Mapping):
            sections[name] = {**sections.get(name, {}), **value}
        elif name in section_of:
            sections.setdefault(section_of[name], {})[name] = value
        else:
            raise ConfigError(f"{path}: unknown setting {name!r:.60}{nearest(name, section_of)}")
    return sections


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes: not a settings file")
        return path.read_text(encoding="utf-8-sig")  # Windows' editors write a byte order mark
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _names(dataclass: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(dataclass)]
