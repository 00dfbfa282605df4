"""What runs a target: cases by coverage or by seeded mutation, each watched, in a killable process.

A case is a few bytes. A target turns them into files and hands these to Vitrail, which may take
them or refuse them with an exception of its own in one printable line. Anything else is a fault:
another exception, more than ``SECONDS`` of a processor, more than ``MEGABYTES`` of memory, a
process begun, an address called, anything written outside the folder that was given.
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
"""Time of one processor that a case may take."""
MEGABYTES = 3000
"""Memory that a process may ever hold: a picture of MAX_PIXELS with alpha takes most of it."""
LONGEST_MESSAGE = 20_000
"""Characters of an error: classes and keys are named in it, but not without end."""
LARGEST_CASE = 1 << 20
SLOT = struct.Struct("<6q2d")
"""Cases done, refused, accepted, faults, kilobytes at most, bytes of the present case; and seconds
of a processor: of the slowest case and of all.
"""
NUMBERS = (0, 1, 2, 16, 100, 127, 128, 254, 255)

Operation = tuple[int, int, int]
"""Which of six changes, where (0 to 65535: a share of the length), and a value (0 to 255)."""


@dataclass(frozen=True)
class Target:
    """One door to Vitrail: cases to begin with, the first one harmless, and how a case enters."""

    name: str
    seeds: Callable[[], list[bytes]]
    attack: Callable[[bytes, Path], None]
    """Hands one case to Vitrail, writing in the folder only; checks what comes out."""
    large: Callable[[], list[bytes]] = list
    """More cases to begin with, which take seconds to make: for the long form."""


class HangError(BaseException):
    """A case took more than its share of a processor; no ``except Exception`` holds it."""


class FaultError(AssertionError):
    """A promise was broken without an exception: what, and by what."""


def require(condition: bool, what: str) -> None:
    """Raise FaultError unless the condition holds."""
    if not condition:
        raise FaultError(what)


@contextmanager
def require_in_time(seconds: float = SECONDS) -> Iterator[None]:
    """Require that the block takes no more than so many seconds of a processor."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except HangError:
        raise FaultError(f"more than {seconds} s of a processor") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run_case(target: Target, data: bytes, root: Path) -> bool:
    """Run one case in ``root/given``; return whether Vitrail took it.

    Raises:
        FaultError: or any other exception but Vitrail's own.
    """
    accepted = True
    try:
        target.attack(data, root / "given")
    except VitrailError as error:
        message = str(error)
        require(message.isprintable() and message != "", f"an error of not one line: {message!r}")
        require(len(message) <= LONGEST_MESSAGE, f"an error of {len(message)} characters")
        accepted = False
    strange = {name for name in os.listdir(root) if name != "given"}  # noqa: PTH208 (faster)
    require(not strange, f"written outside the folder, or code was run: {strange}")
    return accepted


def mutate(data: bytes, operations: Sequence[Operation], others: Sequence[bytes]) -> bytes:
    """Return the bytes with some changes."""
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
    """Return case ``number``: the seeds first, then seeds that were changed."""
    if number < len(seeds):
        return seeds[number]
    draw = random.Random(f"{seed}/{number}")
    operations = [
        (draw.randrange(6), draw.randrange(65536), draw.randrange(256))
        for _ in range(draw.choice((1, 1, 2, 3, 6)))
    ]
    return mutate(draw.choice(seeds), operations, seeds)


class Watch:
    """Runs cases one by one and keeps what came of them where the parent process sees it."""

    def __init__(self, target: Target, root: Path, slot: Path, *, cases: int) -> None:
        self.target, self.root, self.cases = target, root, cases
        self.faults = slot.with_suffix(".faults")
        with slot.open("r+b") as file:
            self.slot = mmap.mmap(file.fileno(), SLOT.size + LARGEST_CASE)
        numbers = SLOT.unpack_from(self.slot)
        self.done, self.refused, self.accepted, self.broken, *_, self.slowest, self.spent = numbers
        self.notes: list[str] = []
        self.listening = False
        signal.signal(signal.SIGPROF, self.stop)

    def stop(self, *_: object) -> None:
        """End a case that takes too long."""
        raise HangError

    def listen(self) -> None:
        """From now on note what no case may do (see ``audit``)."""
        if not self.listening:
            sys.addaudithook(self.audit)
        self.listening = True

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note a process begun, a connection, a file written anywhere but in the folder."""
        if event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "socket.connect",
            "pty.spawn",
        ):
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
        """Tell whether a path is in the folder that is given."""
        whole = os.path.realpath(os.fsdecode(path))
        return whole.startswith((f"{os.path.realpath(self.root)}/given", "/dev/null"))

    def case(self, data: bytes) -> None:
        """Run one case and write down what came of it; end the process after the last."""
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
            require(not self.notes, f"did what no case may: {self.notes[:3]}")
        except HangError:
            self.fault(data, f"more than {SECONDS} s\n{traceback.format_exc()}")
        except Exception:  # noqa: BLE001 (every exception but Vitrail's own is a fault)
            self.fault(data, traceback.format_exc())
        else:
            self.accepted += accepted
            self.refused += not accepted
        taken = time.process_time() - began
        self.slowest, self.spent = max(self.slowest, taken), self.spent + taken
        self.done += 1
        self.keep(0)
        if self.done == 1:
            self.listen()  # what is loaded once has been loaded
        if self.done >= self.cases:
            self.slot.flush()
            os._exit(0)

    def fault(self, data: bytes, what: str) -> None:
        """Keep a case that broke a promise, and put right what it left behind."""
        self.broken += 1
        self.notes.clear()
        for name in set(os.listdir(self.root)) - {"given"}:  # noqa: PTH208
            strange = self.root / name
            shutil.rmtree(strange) if strange.is_dir() else strange.unlink()
        keep_fault(self.faults, self.broken, data, what)
        self.notes.clear()  # of what was done here

    def keep(self, length: int) -> None:
        """Write the numbers where the parent sees them."""
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
    """Write down a case that broke a promise; of many only the first."""
    if number <= 50:
        folder.mkdir(exist_ok=True)
        (folder / f"{number:03}.case").write_bytes(data)
        (folder / f"{number:03}.txt").write_text(what, errors="backslashreplace")


def fuzz(watch: Watch, seeds: Sequence[bytes], *, seed: int, engine: str, scratch: Path) -> None:
    """Run cases to the end; this ends the process, too."""
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
            "-timeout=600",  # the watch has its own; atheris takes 0 for "at once"
            "-rss_limit_mb=0",
            "-malloc_limit_mb=0",
            "-reload=0",
            "-detect_leaks=0",
        ]
        watch.case(seeds[0])  # libFuzzer begins with cases of its own
        atheris.Setup(["hostile", *flags, str(corpus)], watch.case)
        atheris.Fuzz()
    for number in range(first, watch.cases):
        watch.case(draw_case(seeds, number, f"{seed}/{watch.target.name}"))
