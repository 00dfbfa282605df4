"""Run the cases of a target, guided by coverage or mutated from seeds, in a process of its own.

A case is a few bytes. A target turns them into files and passes these to Vitrail, which may accept
them or refuse them with a VitrailError of one printable line. Anything else is a fault: another
exception, more than ``SECONDS`` of CPU time, more than ``MEGABYTES`` of memory, a new process, a
network connection, or a file written outside the given folder.
"""

import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.errors import VitrailError

SECONDS = 5.0
"""CPU time that a case may take."""
MEGABYTES = 3000
"""Peak memory of a process: a picture of MAX_PIXELS with alpha takes most of it."""
LONGEST_MESSAGE = 20_000
"""Maximum length of an error message, which may list classes and keys."""
LARGEST_CASE = 1 << 20
SLOT = struct.Struct("<6q2d")
"""Cases done, refused, accepted, faults, peak KiB, bytes of the current case; and CPU seconds: of
the slowest case, of all.
"""
FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
    "pty.spawn",
)  # fmt: skip
NUMBERS = (0, 1, 2, 16, 100, 127, 128, 254, 255)

Operation = tuple[int, int, int]
"""One of six mutations, its position (0 to 65535, relative to the length), a value (0 to 255)."""


@dataclass(frozen=True)
class Target:
    """One kind of input: seed cases, the first of them valid, and a function that runs a case."""

    name: str
    seeds: Callable[[], list[bytes]]
    attack: Callable[[bytes, Path], None]
    """Passes one case to Vitrail, writing to the folder only, and checks the result."""
    large: Callable[[], list[bytes]] = list
    """More seeds, which take seconds to make."""


class HangError(BaseException):
    """A case took too long. No ``except Exception`` catches it."""


class FaultError(AssertionError):
    """A fault other than an unexpected exception."""


def require(condition: bool, what: str) -> None:
    """Raise FaultError unless the condition holds."""
    if not condition:
        raise FaultError(what)


@contextmanager
def require_in_time(seconds: float = SECONDS) -> Iterator[None]:
    """Require that the block takes no more than N seconds of CPU time."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except HangError:
        raise FaultError(f"more than {seconds} s of CPU time") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run_case(target: Target, data: bytes, root: Path) -> bool:
    """Run one case in ``root/given``; return whether Vitrail accepted it.

    Raises:
        FaultError: the case is a fault; so is any exception but a VitrailError.
    """
    accepted = True
    try:
        target.attack(data, root / "given")
    except VitrailError as error:
        message = str(error)
        require(
            message.isprintable() and message != "", f"an error of more than one line: {message!r}"
        )
        require(len(message) <= LONGEST_MESSAGE, f"an error of {len(message)} characters")
        accepted = False
    strange = {name for name in os.listdir(root) if name != "given"}  # noqa: PTH208 (faster)
    require(not strange, f"written outside the folder, or code was run: {strange}")
    return accepted


def mutate(data: bytes, operations: Sequence[Operation], others: Sequence[bytes]) -> bytes:
    """Return the mutated bytes."""
    case = bytearray(data)
    for kind, where, value in operations:
        at = where * (len(case) + 1) >> 16
        if kind == 0 and case:
            case[at % len(case)] ^= 1 << value % 8
        elif kind == 1 and case:
            case[at % len(case)] = NUMBERS[value % len(NUMBERS)] if value < 128 else value
        elif kind == 2:
            case[at : at + 1 + value % 16] = b""
        elif kind == 3:
            case[at:at] = case[at : at + value] or bytes([value])
        elif kind == 4:
            number = (1 << value % 65) - value // 65 % 2
            case[at : at + 4] = (number & 0xFFFFFFFF).to_bytes(4, "big" if value % 2 else "little")
        elif kind == 5:
            other = others[value % len(others)]
            case[at:] = other[where * (len(other) + 1) >> 16 :]
    return bytes(case[:LARGEST_CASE])


def draw_case(seeds: Sequence[bytes], number: int, seed: str) -> bytes:
    """Return case ``number``: the seeds first, then mutated seeds."""
    if number < len(seeds):
        return seeds[number]
    draw = random.Random(f"{seed}/{number}")
    operations = [
        (draw.randrange(6), draw.randrange(65536), draw.randrange(256))
        for _ in range(draw.choice((1, 1, 2, 3, 6)))
    ]
    return mutate(draw.choice(seeds), operations, seeds)


class Watch:
    """Runs cases one by one and writes the results to shared memory for the parent process."""

    def __init__(self, target: Target, root: Path, slot: Path, *, cases: int) -> None:
        self.target, self.root, self.cases = target, root, cases
        self.faults = slot.with_suffix(".faults")
        with slot.open("r+b") as file:
            self.slot = mmap.mmap(file.fileno(), SLOT.size + LARGEST_CASE)
        numbers = SLOT.unpack_from(self.slot)
        self.done, self.refused, self.accepted, self.broken, *_, self.slowest, self.spent = numbers
        self.notes: list[str] = []
        self.audited = False
        signal.signal(signal.SIGPROF, self.stop)

    def stop(self, *_: object) -> None:
        """Stop a case that takes too long."""
        raise HangError

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Record new processes, network connections, and files written outside the folder."""
        if event in FORBIDDEN:
            self.notes.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[2], int):
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str | bytes) and not self.inside(path):
                self.notes.append(f"opened {path!r} for writing")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link"):
            paths = arguments[: 2 if event in ("os.rename", "os.symlink", "os.link") else 1]
            if not all(isinstance(p, int) or self.inside(os.fspath(p)) for p in paths):
                self.notes.append(f"{event} {arguments!r:.200}")

    def inside(self, path: str | bytes) -> bool:
        """Return whether a path is inside the given folder."""
        real = os.path.realpath(os.fsdecode(path))
        return real.startswith((f"{os.path.realpath(self.root)}/given", "/dev/null"))

    def case(self, data: bytes) -> None:
        """Run one case and record its result; end the process after the last one."""
        data = bytes(data[:LARGEST_CASE])
        self.keep(len(data))
        self.slot[SLOT.size : SLOT.size + len(data)] = data
        began = time.process_time()
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                accepted = run_case(self.target, data, self.root)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            require(not self.notes, f"forbidden events: {self.notes[:3]}")
        except HangError:
            self.fault(data, f"more than {SECONDS} s\n{traceback.format_exc()}")
        except Exception:  # noqa: BLE001 (every exception but a VitrailError is a fault)
            self.fault(data, traceback.format_exc())
        else:
            self.accepted += accepted
            self.refused += not accepted
        taken = time.process_time() - began
        self.slowest, self.spent = max(self.slowest, taken), self.spent + taken
        self.done += 1
        self.keep(0)
        if not self.audited:  # from the second case of a process on: lazy imports are done
            self.audited = True
            sys.addaudithook(self.audit)
        if self.done >= self.cases:
            self.slot.flush()
            os._exit(0)

    def fault(self, data: bytes, what: str) -> None:
        """Keep a faulty case, and remove what it left behind."""
        self.broken += 1
        self.notes.clear()
        for name in set(os.listdir(self.root)) - {"given"}:  # noqa: PTH208
            strange = self.root / name
            shutil.rmtree(strange) if strange.is_dir() else strange.unlink()
        keep_fault(self.faults, self.broken, data, what)
        self.notes.clear()  # events of this function

    def keep(self, length: int) -> None:
        """Write the numbers to shared memory."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        SLOT.pack_into(
            self.slot,
            0,
            self.done,
            self.refused,
            self.accepted,
            self.broken,
            peak,
            length,
            self.slowest,
            self.spent,
        )


def keep_fault(folder: Path, number: int, data: bytes, what: str) -> None:
    """Write a faulty case to a file, for the first 50."""
    if number <= 50:
        folder.mkdir(exist_ok=True)
        (folder / f"{number:03}.case").write_bytes(data)
        (folder / f"{number:03}.txt").write_text(what, errors="backslashreplace")


def fuzz(watch: Watch, seeds: Sequence[bytes], *, seed: int, engine: str, scratch: Path) -> None:
    """Run all cases, then end the process."""
    first = watch.done
    if engine == "atheris":
        import atheris

        corpus = scratch / f"corpus-{first}"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, case in enumerate(seeds[first:] or seeds):
            (corpus / f"{number:05}").write_bytes(case)
        flags = [
            f"-seed={seed + first + 1}",
            "-max_len=8192",
            "-verbosity=0",
            "-timeout=600",  # Watch has its own; 0 means immediately in atheris
            "-rss_limit_mb=0",
            "-malloc_limit_mb=0",
            "-reload=0",
            "-detect_leaks=0",
        ]
        watch.case(seeds[0])  # libFuzzer starts with its own cases
        atheris.Setup(["hostile", *flags, str(corpus)], watch.case)
        atheris.Fuzz()
    for number in range(first, watch.cases):
        watch.case(draw_case(seeds, number, f"{seed}/{watch.target.name}"))
