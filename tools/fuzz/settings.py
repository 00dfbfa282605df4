"""Untrusted settings: TOML and JSON, as text and as unexpected values."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch

from fuzz.engine import Target, require
from vitrail.config.files import from_json, read_json, read_toml, to_json
from vitrail.config.presets import PRESETS
from vitrail.config.settings import Config
from vitrail.model.vit import VisionTransformer

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    4,
    8,
    12,
    16,
    64,
    100_000,
    2**31,
    2**63,
    10**30,
    -(2**63),
    0.0,
    -0.0,
    0.1,
    0.5,
    0.999,
    1.5,
    1e-320,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "cls",
    "mean",
    "conv",
    "patch",
    "rope",
    "sincos",
    "learned",
    "mlp",
    "linear",
    "muon",
    "folder",
    "cifar10",
    "test",
    "cuda",
    "\0",
    "\ud800",
    "\udce9",
    "\x1b[31mred\x1b[0m",
    "\u202e",
    "..",
    ".",
    "/",
    "../x",
    "/etc/passwd",
    "-x",
    "a\nb",
    "<script>",
    "[red]",
    "n" * 5000,
    [],
    [1],
    [32, 40],
    [0.5, 0.5, 0.5],
    [math.nan] * 3,
    [1, 2, 3],
    [None, None],
    {},
    {"a": 1},
    [[[[]]]],
    {"model": {}},
)
"""Unexpected values for settings."""


def places(table: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all values of a table, and of the tables in it."""
    found = []
    for name, value in table.items():
        found.append((*before, name))
        if isinstance(value, dict):
            found += places(value, (*before, name))
    return found


def set_values(table: dict[str, Any], choices: bytes) -> dict[str, Any]:
    """Return the table with values set: two bytes choose a place and a value."""
    table = json.loads(json.dumps(table))
    paths = places(table)
    for place, value in zip(choices[::2], choices[1::2], strict=False):
        *path, last = paths[place % len(paths)]
        inner: Any = table
        for name in path:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            # The highest bytes add unknown settings.
            known = value < 250
            inner[last if known else last + "s\n"] = copy.deepcopy(VALUES[value % len(VALUES)])
    return table


def attack_json(data: bytes, folder: Path) -> None:
    """Read settings from JSON: the bytes themselves, or values set at places."""
    path = folder / "config.json"
    if data[:1] == b"v":
        text = json.dumps(set_values(to_json(Config()), data[1:]))
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(data)
    check(from_json(read_json(path)))


def attack_toml(data: bytes, folder: Path) -> None:
    """Read settings from TOML: the bytes themselves, or chosen settings and values."""
    path = folder / "mine.toml"
    path.write_bytes(as_toml(data[1:]) if data[:1] == b"v" else data)
    check(read_toml(path, Config()))


def as_toml(choices: bytes) -> bytes:
    """Return settings as TOML: two bytes choose a setting and a value."""
    names = [*Config().flat(), "model", "data.mean", "run.x", '"\\u001b[31m"', "[model]\nx"]
    lines = []
    for name, value in zip(choices[::2], choices[1::2], strict=False):
        chosen = VALUES[value % len(VALUES)]
        text = json.dumps(chosen).replace("NaN", "nan").replace("Infinity", "inf")
        lines.append(f"{names[name % len(names)]} = {text.replace(': ', ' = ')}")
    return "\n".join(lines).encode()


def check(config: Config) -> None:
    """Check accepted settings."""
    require(from_json(to_json(config)) == config, "settings do not round-trip through JSON")
    model = config.model
    if model.n_classes and model.n_layers <= 12:
        with torch.device("meta"):
            VisionTransformer(model)


def settings_seeds() -> list[bytes]:
    """Return settings as JSON."""
    presets = [json.dumps(to_json(preset.config)).encode() for preset in PRESETS.values()]
    deep = [
        b"[" * 99_999,
        b'{"a":' * 50_000,
        b"9" * 9_000,
        b'{"run": {"seed": ' + b"9" * 9_000 + b"}}",
    ]
    words = [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": null}',
        b'{"training": {"epochs": 1e999}}',
        b'{"data": {"data_path": "\\u0000"}}',
        b'{"\\ud800": 1}',
    ]
    return [*presets, *deep, *words, *chosen()]


def toml_seeds() -> list[bytes]:
    """Return settings as TOML."""
    words = [
        b"",
        b"epochs = ",
        b"epochs = 0x" + b"f" * 9_000,
        b"seed = " + b"9" * 9_000,
        b"a = " + b"[" * 5_000,
        b"\xff",
        b"epochs = nan",
        b"a = {" * 3_000,
        b"mean = [inf, 0.5, 0.5]",
        b"[[model]]\n",
        b'"\\u001b[31m" = 1',
        b"learning_rate = 1e999",
        b"epochs = 1979-05-27T07:32:00Z",
        b"[model]\n" * 9,
    ]
    valid = b"".join(
        f"{name} = {json.dumps(value)}\n".encode()
        for section in to_json(Config()).values()
        for name, value in section.items()
        if value is not None
    )
    return [valid, *words, *chosen()]


def chosen() -> list[bytes]:
    """Return cases with every value at some place."""
    return [b"v" + bytes((number * 7 % 256, number)) for number in range(256)]


JSON = Target("settings, JSON", settings_seeds, attack_json)
TOML = Target("settings, TOML", toml_seeds, attack_toml)
