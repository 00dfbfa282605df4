"""SIGTERM and SIGINT, once and twice; two runs writing to the same folder."""

import random
import signal
import time
from pathlib import Path

from faults.child import STEPS, WORDS, Child, Plan
from faults.folder import (
    finish,
    folders,
    losses,
    require_one_line,
    require_valid,
    resume_run,
    undisturbed,
)
from faults.tally import Tally

STOPPING_SECONDS = 10.0
"""Seconds in which a run must stop after a signal."""


def asked(folder: Path, *, times: int, epochs: int | None = None, seed: int = 5) -> Tally:
    """Ask one run to stop again and again, with both signals in turn, and resume each time."""
    tally = Tally("SIGTERM, SIGINT")
    words = ("--epochs", str(epochs or 3 * times))
    truth = undisturbed(*words)
    cwd, random_ = folder / "asked", random.Random(seed)
    for number in range(times):
        child = resume_run(cwd, *words, plan=Plan(slow_after=2 * STEPS))
        child.until(random_.randint(1, 2 * STEPS))
        time.sleep(random_.uniform(0, 0.02))
        if not child.alive:
            break
        with tally.trial(f"time {number}"):
            wanted = (signal.SIGTERM, signal.SIGINT)[number % 2]
            began = time.monotonic()
            child.signal(wanted)
            code = child.wait()
            seconds = time.monotonic() - began
            assert code == 128 + wanted, f"exit code {code}: {child.errors}"
            assert seconds < STOPPING_SECONDS, f"{seconds:.1f} s to stop"
            assert "vitrail train --resume output/run" in child.errors, child.errors
            assert "Traceback" not in child.errors, child.errors
            newest = require_valid(cwd / "output/run", truth)
            assert newest == max(losses(cwd)), "an update was not saved"
    with tally.trial("the end"):
        assert tally.tried > times, f"only {tally.tried - 1} signals before the end"
        finish(cwd, truth, *words)
    return tally


def early(folder: Path, *, times: int, epochs: int = 2, seed: int = 6) -> Tally:
    """Send a signal while a run starts: it ends, without a traceback, and can be started again."""
    tally = Tally("SIGTERM, SIGINT before the first update")
    words = ("--epochs", str(epochs))
    truth = undisturbed(*words)
    random_ = random.Random(seed)
    for number in range(times):
        cwd = folder / f"early-{number}"
        with tally.trial(f"time {number}"):
            child = resume_run(cwd, *words)
            while child.alive and not (cwd / "000.ready").exists():
                time.sleep(0.001)  # earlier signals are handled by Python
            time.sleep(random_.uniform(0, 0.1))
            wanted = (signal.SIGTERM, signal.SIGINT)[number % 2]
            child.signal(wanted)
            code = child.wait()
            assert code in (0, -signal.SIGTERM, 128 + wanted), f"exit code {code}"
            assert "Traceback" not in child.errors, child.errors
            finish(cwd, truth, *words)
    return tally


def twice(folder: Path, *, times: int, epochs: int = 12) -> Tally:
    """Send the same signal again while a slow disk is writing: it stops at once."""
    tally = Tally("SIGTERM, SIGINT twice")
    words = ("--epochs", str(epochs))
    truth = undisturbed(*words)
    for number in range(times):
        cwd = folder / f"twice-{number}"
        with tally.trial(f"time {number}"):
            wanted = (signal.SIGTERM, signal.SIGINT)[number % 2]
            child = resume_run(cwd, *words, plan=Plan(slow_save=True))
            child.until(2 * STEPS)
            (cwd / "slow").touch()
            while child.alive and not (cwd / "saving").exists():
                time.sleep(0.002)
            began = time.monotonic()
            while child.alive:
                child.signal(wanted)  # the first is noted, the second ends the process
                time.sleep(0.2)
            code = child.wait()
            assert code == -wanted, f"exit code {code}: {child.errors}"
            seconds = time.monotonic() - began
            assert seconds < STOPPING_SECONDS / 2, f"{seconds:.1f} s to stop"
            require_valid(cwd / "output/run", truth)
            (cwd / "slow").unlink()
            finish(cwd, truth, *words)
    return tally


def two_runs(folder: Path, *, times: int, epochs: int = 12) -> Tally:
    """Start a second run in the folder of a first; kill the first; resume."""
    tally = Tally("Two runs in one folder")
    words = ("--epochs", str(epochs))
    truth = undisturbed(*words)
    for number in range(times):
        cwd = folder / f"two-{number}"
        with tally.trial(f"time {number}"):
            first = resume_run(cwd, *words, plan=Plan(slow_after=2 * STEPS, pause=5.0))
            first.until(2 * STEPS)
            second = resume_run(cwd)
            require_one_line(second, codes=(2,))
            assert "in use by another run" in second.errors, second.errors
            assert first.alive, first.errors
            first.signal(signal.SIGKILL)
            first.wait()
            finish(cwd, truth, *words)
    return tally


def race(folder: Path, *, times: int, epochs: int = 2) -> Tally:
    """Start two runs with the same folder name at the same moment: one trains."""
    tally = Tally("Two runs started at once in one folder")
    words = ("--epochs", str(epochs))
    truth = undisturbed(*words)
    for number in range(times):
        cwd = folder / f"race-{number}"
        with tally.trial(f"time {number}"):
            (cwd / "a").mkdir(parents=True)
            both = [fresh(cwd, name, *words) for name in ("a", "b")]
            codes = sorted(child.wait() for child in both)
            assert codes == [0, 2], f"exit codes {codes}: {[child.errors for child in both]}"
            (loser,) = (child for child in both if child.wait() == 2)
            require_one_line(loser, codes=(2,))
            assert require_valid(cwd / "output/run", truth) == truth.steps, "not saved"
            assert len(folders(cwd / "output/run")) <= 2, "two runs' checkpoints"
    return tally


def fresh(cwd: Path, name: str, *words: str) -> Child:
    """Start a run in a folder that other processes try to use, too."""
    output = ("--output_path", str(cwd / "output"), "--folder_name", "run")
    return Child(cwd / name, *WORDS, *words, *output)
