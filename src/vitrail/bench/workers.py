"""Worker processes and rounds: every contestant alive, one at work, in turn."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from vitrail.errors import BenchError

Name = TypeVar("Name")

SHIM = {"TV_SHIM": "1"}
"""Lets an environment of benchmarks/peers.sh define torchvision's missing operators."""


class Worker:
    """One process that measures when asked. Close it, or use it in a ``with`` block."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, env={**os.environ, **SHIM},
        )  # fmt: skip
        self.about: dict[str, Any] = {}
        self.peak_mib = 0.0

    def wait_ready(self) -> None:
        """Wait until it has built what it measures; ``about`` holds what it says of itself.

        Raises:
            BenchError: it could not; the last line of its standard error says why.
        """
        self.about = self._answer()

    def rate(self, request: Any) -> float:
        """Let it work once; return images (or operations) a second.

        Raises:
            BenchError: it came to an end.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what became of it is told below
        answer = self._answer()
        self.peak_mib = answer["peak_mib"]
        return float(answer["done"] / answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            lines = [text.strip() for text in self._errors if text.strip()]
            raise BenchError(lines[-1] if lines else f"ended with code {code}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def command(spec: Mapping[str, Any], python: Path | None = None) -> list[str]:
    """Return the command line of a worker: ours, or a peer's in its own interpreter."""
    words = json.dumps(spec, default=str)
    if python is None:
        return [sys.executable, "-m", "vitrail.bench.ours", words]
    # Isolated, so that no PYTHONPATH of ours puts our packages before theirs.
    return [str(python), "-I", str(Path(__file__).with_name("peers.py")), words]


@contextmanager
def started(
    commands: Mapping[Name, Sequence[str]], give_up: Callable[[Name, BenchError], None]
) -> Iterator[dict[Name, Worker]]:
    """Start processes side by side and yield those that got ready; ``give_up`` hears the others."""
    with ExitStack() as stack:
        begun = {name: stack.enter_context(Worker(words)) for name, words in commands.items()}
        ready = {}
        for name, worker in begun.items():
            try:
                worker.wait_ready()
                ready[name] = worker
            except BenchError as error:
                give_up(name, error)
        yield ready


def interleave(
    contestants: Mapping[Name, Callable[[], float]], *, rounds: int
) -> dict[Name, list[float]]:
    """Call each contestant once a round, A B A B, after one round that is not counted.

    A contestant measures itself and returns its rate, so that a machine that grows slower or
    faster meanwhile treats all alike.
    """
    rates: dict[Name, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, measure in contestants.items():
            rate = measure()
            if number:
                rates[name].append(rate)
    return rates


def python_of(environment: Path) -> Path:
    """Return the interpreter of a virtual environment, or the interpreter that is named itself.

    Raises:
        BenchError: there is none.
    """
    for path in (environment / "bin/python", environment / "Scripts/python.exe", environment):
        if path.is_file():
            return path.absolute()  # not resolved: a link's place is what makes the environment
    raise BenchError(
        f"{environment}: no virtual environment; make one: bash benchmarks/peers.sh {environment}"
    )
