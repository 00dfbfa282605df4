"""What a command sets in its own process before torch is loaded: spinning threads, freed memory.

The library leaves both alone: they are up to the owner of the process. Nothing heavy is imported.
"""

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

IDLE_SPINS, SHARED_SPINS = 30_000, 1_000
"""Rounds that a thread spins before it sleeps, on an idle machine and beside other programs.

Measurements of other values are in records/waiting.
"""
SHARED = 0.4
"""The machine counts as shared if other programs use at least this many cores on average."""
WINDOW = 0.06
"""Minimum seconds to observe the load; the system counts in hundredths."""
SPIN_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables with which users choose for themselves."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_THRESHOLD = 2**31 - 1
"""Bytes: the largest value that mallopt accepts."""


class Load(NamedTuple):
    """The wall clock, and seconds of CPU time that other processes used on our cores."""

    clock: float
    others: float


def read_load(stat: Path = Path("/proc/stat")) -> Load | None:
    """Return the load so far, or None where the system does not provide it."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        text = stat.read_text(encoding="ascii")
    except OSError:
        return None
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = map(str.split, text.splitlines())
    counts = [list(map(int, values[:8])) for name, *values in lines if name in cores]
    idle_and_waiting = slice(3, 5)
    ticks = sum(sum(count) - sum(count[idle_and_waiting]) for count in counts)
    return Load(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") - time.process_time())


START = read_load()
"""The load when this module was imported: the first thing that a command does."""


def limit_spinning() -> None:
    """Limit how long OpenMP's threads spin, unless the user has set it. Call it before torch loads.

    After each parallel operation, GNU's OpenMP lets threads spin: they are ready at once for the
    next operation, but occupy their cores. By default they spin for milliseconds, which made
    training beside one other busy process 5 to 13 times slower than alone. The limit costs nothing
    on an idle machine; it is much lower where other programs need the cores.
    """
    if START is None or any(name in os.environ for name in SPIN_VARIABLES):
        return
    time.sleep(max(0.0, START.clock + WINDOW - time.monotonic()))
    if now := read_load():
        shared = (now.others - START.others) / (now.clock - START.clock) >= SHARED
        os.environ["GOMP_SPINCOUNT"] = str(SHARED_SPINS if shared else IDLE_SPINS)


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensors; return whether it does.

    By default it returns each large tensor of a training step to the system and gets it back page
    by page, which takes a twentieth of the step (docs/log.md). The price: the process keeps its
    peak memory until it ends. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # The second alone would be worse: it stops glibc from adjusting the first dynamically.
    return bool(
        mallopt
        and mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        and mallopt(M_TRIM_THRESHOLD, LARGEST_THRESHOLD)
    )
