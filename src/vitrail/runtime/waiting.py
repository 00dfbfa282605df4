"""How the threads of torch wait for one another, chosen before torch is loaded.

After each parallel operation, GNU's OpenMP lets threads spin: they are ready at once for the next
operation, but occupy their cores. By default they spin for milliseconds, so training beside one
other busy process was 5 to 13 times slower than alone. Here they spin for a bounded time: long
enough to cost nothing on an idle machine, and much shorter where another program is busy, as the
core is then needed (records/waiting has the measurements).
"""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

ALONE, SHARED = 30_000, 1_000
"""Rounds that a thread spins before it sleeps: on an idle machine, and beside other programs."""
BUSY = 0.4
"""Cores that other programs use on average, from which on the machine counts as shared."""
WINDOW = 0.06
"""Seconds to watch at least; the system counts in hundredths."""
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables by which users choose for themselves."""


class Reading(NamedTuple):
    """Seconds of clock, of this process and of all processes on the cores it may use."""

    clock: float
    own: float
    total: float


def read_processor(stat: Path = Path("/proc/stat")) -> Reading | None:
    """Return how long the cores have been busy; None where the system does not say."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for name, *values in map(str.split, lines):
        if name in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])
            ticks += user + nice + system + irq + softirq + steal
    return Reading(time.monotonic(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK"))


def others(before: Reading, now: Reading) -> float:
    """Return how many cores other programs used on average between two readings."""
    return (now.total - before.total - (now.own - before.own)) / (now.clock - before.clock)


def choose_waiting(before: Reading | None) -> None:
    """Bound the time that OpenMP's threads spin, unless the user has chosen.

    Args:
        before: a reading from the start of the program.
    """
    if before is None or any(name in os.environ for name in CHOSEN):
        return
    time.sleep(max(0.0, before.clock + WINDOW - time.monotonic()))
    now = read_processor()
    if now is not None:
        shared = others(before, now) >= BUSY
        os.environ["GOMP_SPINCOUNT"] = str(SHARED if shared else ALONE)
