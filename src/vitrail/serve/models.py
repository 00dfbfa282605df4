"""The models that are served: loaded when first asked for, and again when their files change."""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitrail.errors import ConfigError, VitrailError, nearest
from vitrail.inference.classifier import Classifier
from vitrail.training.run_folder import is_run_folder
from vitrail.weights import bundled
from vitrail.weights.checkpoint import step_of
from vitrail.weights.pretrained import load

log = logging.getLogger("vitrail")

MOST_LOADED = 12
"""Maximum number of models and checkpoints in memory; the least recently used is dropped."""


class MissingError(VitrailError):
    """Something that the server does not have, or cannot load."""


@dataclass(frozen=True)
class _Loaded:
    classifier: Classifier
    stamp: str


class Shelf:
    """The served models, by name. Every method may be called from several threads."""

    def __init__(self, models: Sequence[str], runs: Path, device: str = "auto") -> None:
        """Serve ``models``, or else all runs in the folder ``runs`` and the bundled models.

        Raises:
            ConfigError: two different models have the same name.
        """
        self._named, self._runs, self._device = _by_name(models), runs, device
        self._sources: dict[str, str] = {}
        self._listed = -math.inf
        self._loaded: OrderedDict[tuple[str, int | None], _Loaded] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the names of all models, the default one first; new runs are found here."""
        self._sources = self._named or _by_name([*_find_runs(self._runs), *bundled.names()])
        self._listed = time.monotonic()
        return list(self._sources)

    def default(self) -> str:
        """Return the name of the default model, from a list at most a second old."""
        if time.monotonic() - self._listed > 1:
            self.names()
        return next(iter(self._sources))

    def source(self, name: str) -> str:
        """Return where a model comes from.

        Raises:
            MissingError: there is no model of this name.
        """
        if name not in self._sources and name not in self.names():
            known = ", ".join(list(self._sources)[:20])
            hint = nearest(name, self._sources)
            raise MissingError(f"no model {name[:60]!r}{hint}: one of {known}")
        return self._sources[name]

    def run_folder(self, name: str) -> Path | None:
        """Return the run folder that a model comes from, or None."""
        source = self.source(name)
        is_run = source not in bundled.names() and is_run_folder(Path(source))
        return Path(source) if is_run else None

    def steps(self, name: str) -> list[int]:
        """Return the steps of a run's checkpoints, ascending; none for other models."""
        folder = self.run_folder(name)
        found = map(step_of, (folder / "checkpoints").iterdir()) if folder else []
        return sorted(step for step in found if step is not None)

    def get(self, name: str, step: int | None = None) -> Classifier:
        """Return a model, or one checkpoint of a run, as its files are now.

        If changed files cannot be loaded, the log says why and the model in memory is kept.

        Raises:
            MissingError: there is no such model or checkpoint, or it cannot be loaded.
        """
        source = self.source(name)
        if step is not None:
            if step not in self.steps(name):
                raise MissingError(f"{name} has no checkpoint of step {step}")
            source = str(Path(source) / "checkpoints" / f"step-{step:07}")
        with self._lock:
            return self._load(name, step, source)

    def _load(self, name: str, step: int | None, source: str) -> Classifier:
        """Return the model in memory if its files have not changed, else load them."""
        key, stamp = (name, step), _stamp(source)
        held = self._loaded.get(key)
        if held is None or held.stamp != stamp:
            try:
                classifier = load(source, device=self._device)
                classifier.require_classes()
                if classifier.device.type == "cpu":
                    classifier = classifier.trace()
            except VitrailError as error:
                log.warning("%s: %s", name, error)
                if held is None:
                    raise MissingError(f"{name} cannot be loaded: see the server's log") from error
                classifier = held.classifier
            self._loaded[key] = held = _Loaded(classifier, stamp)
        self._loaded.move_to_end(key)
        while len(self._loaded) > MOST_LOADED:
            self._loaded.popitem(last=False)
        return held.classifier


def _by_name(models: Sequence[str]) -> dict[str, str]:
    """Return models by the last part of their path, without the suffix of a weights file.

    Your own model with the name of a bundled one gets another.
    """
    named: dict[str, str] = {}
    for model in models:
        path = Path(model)
        name = path.stem if path.is_file() else path.name or path.resolve().name
        if name in bundled.names() and model != name:
            name += " (yours)"
        if named.setdefault(name, model) != model:
            raise ConfigError(
                f"{named[name]} and {model} would both be served as {name}: rename one of them"
            )
    return named


def _find_runs(folder: Path) -> list[str]:
    """Return the runs in a folder that have a best checkpoint, the newest first."""
    pointers = [path for path in folder.glob("*/checkpoints/BEST") if path.is_file()]
    pointers.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [str(path.parent.parent) for path in pointers]


def _stamp(source: str) -> str:
    """Return a string that changes when a model's files do."""
    path = Path(source)
    if source in bundled.names():
        return ""
    try:
        if is_run_folder(path):
            return (path / "checkpoints" / "BEST").read_text(encoding="utf-8", errors="replace")
        status = path.stat()
    except OSError as error:
        return str(error.errno)
    return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"
