"""Worker processes, all alive at once, that are measured in turn, round by round."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from vitrail.errors import VitrailError

Name = TypeVar("Name")

FOLDER = Path(__file__).parent


class BenchError(VitrailError):
    """A measurement that failed."""


class Worker:
    """One process that measures when asked. Close it, or use it in a ``with`` block."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True,
        )  # fmt: skip
        self.about: dict[str, Any] = {}
        self.peak_mib = 0.0

    def wait_ready(self) -> None:
        """Wait until it has built what it measures, and keep what it reports in ``about``.

        Raises:
            BenchError: it failed; the message is the last line of its standard error.
        """
        self.about = self._answer()

    def rate(self, request: Any) -> float:
        """Run one round; return images (or operations) per second.

        Raises:
            BenchError: the process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer reports why it ended
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
        """Kill the process."""
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
        return [sys.executable, "-P", str(FOLDER / "ours.py"), words]
    return [str(python), "-I", str(FOLDER / "peers.py"), words]  # without our PYTHONPATH


@contextmanager
def started(
    commands: Mapping[Name, Sequence[str]], give_up: Callable[[Name, BenchError], None]
) -> Iterator[dict[Name, Worker]]:
    """Start all processes and yield those that became ready; call ``give_up`` for the others."""
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
    """Call each contestant once per round (A B A B), after one warm-up round.

    A machine that becomes slower or faster meanwhile affects all contestants equally.
    """
    rates: dict[Name, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, measure in contestants.items():
            rate = measure()
            if number:
                rates[name].append(rate)
    return rates


def python_of(environment: Path) -> Path:
    """Return the interpreter of a virtual environment, or the path itself if it is an interpreter.

    Raises:
        BenchError: no interpreter was found.
    """
    for path in (environment / "bin/python", environment):
        if path.is_file():
            return path.absolute()  # not resolved: the link's location defines the environment
    raise BenchError(
        f"{environment}: not a virtual environment; create one with: "
        f"bash benchmarks/peers.sh {environment}"
    )
