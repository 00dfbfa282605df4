"""The search space: ``learning_rate=1e-4..1e-2:log`` -> settings of a trial."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from vitrail.config.files import convert, from_json
from vitrail.config.settings import Config, DataConfig, RunConfig, require
from vitrail.errors import ConfigError, nearest

FIXED = {field.name for field in fields(RunConfig)} - {"seed"} | {
    *("dataset", "data_path", "validation_images", "num_test_images", "num_workers")
}
"""Settings that cannot be searched: where and on what data trials run."""

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Dimension:
    """A setting to search: a list of values or a range of numbers."""

    name: str
    values: tuple[Value, ...] = ()
    """The list; empty for a range."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Sample uniformly on a logarithmic scale."""
    step: float | None = None
    whole: bool = False
    """Integers only."""

    def suggest(self, trial: Any) -> Value:
        """Return the value that Optuna suggests for a trial."""
        if self.values:
            return trial.suggest_categorical(self.name, self.values)  # type: ignore[no-any-return]
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return int(trial.suggest_int(self.name, low, high, log=self.log, step=step))
        return float(
            trial.suggest_float(self.name, self.low, self.high, log=self.log, step=self.step)
        )


def _settings_by_name() -> dict[str, tuple[str, Any]]:
    """Return each setting that can be searched, with its section and type."""
    return {
        name: (section, hint)
        for section, kind in get_type_hints(Config).items()
        for name, hint in get_type_hints(kind).items()
        if name not in FIXED
    }


def parse_space(words: Iterable[str]) -> tuple[Dimension, ...]:
    """Parse the arguments of --search.

    Raises:
        ConfigError: no argument, a name twice, or an invalid argument.
    """
    space = tuple(map(parse_dimension, words))
    names = [dimension.name for dimension in space]
    require(bool(space), "nothing to search: give --search, e.g. learning_rate=1e-4..1e-2:log")
    for name in names:
        require(names.count(name) == 1, f"--search has {name} twice: give it once")
    return space


def parse_dimension(word: str) -> Dimension:
    """Parse one argument: ``NAME=A,B,C`` or ``NAME=LOW..HIGH`` (``:log``, ``:STEP``)."""
    name, equals, text = word.partition("=")
    name = name.replace("-", "_")
    known = _settings_by_name()
    require(bool(equals and text), f"--search {word}: give NAME=A,B,C or NAME=LOW..HIGH[:log]")
    if name in FIXED:
        raise ConfigError(f"--search {word}: {name} must be the same in all trials")
    if name not in known:
        raise ConfigError(f"--search {word}: unknown setting {name!r}{nearest(name, known)}")
    hint = known[name][1]
    if ".." in text:
        return _parse_range(name, text, hint, word)
    values = tuple(convert(name, _read_value(part), hint) for part in text.split(","))
    require(len(set(values)) > 1, f"--search {word}: give at least two different values")
    return Dimension(name, values)


def _parse_range(name: str, text: str, hint: Any, word: str) -> Dimension:
    """Parse a range of numbers."""
    kinds = {hint, *get_args(hint)}
    require(
        bool(kinds & {int, float}), f"--search {word}: {name} is not a number: give a list A,B,C"
    )
    bounds, _, how = text.partition(":")
    low, _, high = bounds.partition("..")
    whole = float not in kinds
    first, last = _read_number(low, word), _read_number(high, word)
    step = _read_number(how, word) if how not in ("", "log") else None
    if whole:
        all_whole = all(number == int(number) for number in (first, last, step or 1))
        require(all_whole, f"--search {word}: {name} takes whole numbers")
    require(first < last, f"--search {word}: {low} is not below {high}")
    require(how != "log" or first > 0, f"--search {word}: a log range must start above 0")
    if step is not None:
        steps = (last - first) / step if step > 0 else 0.5
        fits = math.isclose(steps, round(steps), abs_tol=1e-9)
        require(
            fits, f"--search {word}: the distance from {low} to {high} is not a multiple of {how}"
        )
    return Dimension(name, (), first, last, log=how == "log", step=step, whole=whole)


def _read_number(text: str, word: str) -> float:
    """Return a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    require(math.isfinite(number), f"--search {word}: {text!r} is not a number")
    return number


def _read_value(text: str) -> Any:
    """Parse a number, true, false or none; return other text unchanged."""
    try:
        return json.loads({"none": "null", "None": "null"}.get(text, text.lower()))
    except json.JSONDecodeError:
        return text


def apply(base: Config, values: Mapping[str, Value]) -> Config:
    """Return the settings with a trial's values.

    Raises:
        ConfigError: the values are incompatible.
    """
    sections: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        sections.setdefault(_settings_by_name()[name][0], {})[name] = value
    return from_json(sections, base)


def signature(base: Config, words: Iterable[str]) -> dict[str, str]:
    """Return the settings that must be equal in all processes of a study, by name."""
    searched = {f"--search {word}": "" for word in sorted(words)}
    own = {field.name for field in fields(DataConfig)} & {"data_path", "num_workers"}
    left_out = {field.name for field in fields(RunConfig)} - {"seed"} | own
    return searched | {n: str(v) for n, v in base.flat().items() if n not in left_out}
