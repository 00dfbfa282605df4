"""SIGKILL: at random moments, and at every write, flush, rename and removal."""

import functools
import random
import signal
import tempfile
import time
from pathlib import Path

from faults.child import STEPS, WORDS, Child, Plan
from faults.folder import finish, require_valid, resume_run, undisturbed
from faults.tally import Tally

RECIPES = {"AdamW, moving average": (), "Muon": ("--optimizer", "muon", "--ema_decay", "0")}


def storm(
    folder: Path,
    *,
    kills: int,
    epochs: int | None = None,
    recipe: str = "AdamW, moving average",
    seed: int,
) -> Tally:
    """Kill one run again and again, at random moments, and resume it each time."""
    tally = Tally(f"SIGKILL at random moments of one run ({recipe})")
    # At most three epochs per process: the run does not end before the last kill.
    words = (*RECIPES[recipe], "--epochs", str(epochs or 3 * kills + 1))
    truth = undisturbed(*words)
    cwd, random_, newest = folder / "storm", random.Random(seed), 0
    while tally.tried < kills:
        child = resume_run(cwd, *words, plan=Plan(slow_after=3 * STEPS))
        child.until(random_.randint(0, 3 * STEPS))
        time.sleep(random_.uniform(0, 0.03))
        if not child.alive:
            break
        with tally.trial(f"kill {tally.tried + 1}"):
            child.signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL, child.errors
            step = require_valid(cwd / "output/run", truth)
            assert step >= newest, f"update {newest} was saved but lost"
            newest = step
    with tally.trial("the end"):
        assert tally.tried > kills, f"only {tally.tried - 1} kills before the end"
        finish(cwd, truth, *words)
    return tally


@functools.cache
def points_of(*words: str) -> list[str]:
    """Return the names of all points of a run, in their order."""
    with tempfile.TemporaryDirectory() as name:
        child = Child(Path(name), *WORDS, *words, "--folder_name", "run", plan=Plan(points=True))
        assert child.wait() == 0, child.errors
        return Path(name, "points.txt").read_text().split()


def every_point(folder: Path, *, epochs: int, only: int | None = None, seed: int = 0) -> Tally:
    """Kill a run at each point, from a fresh start each time, then resume it to its end."""
    tally = Tally("SIGKILL at a write, flush, rename or removal")
    words = ("--epochs", str(epochs))
    truth = undisturbed(*words)
    for number, name in chosen(points_of(*words), only, seed):
        cwd = folder / f"point-{number}"
        with tally.trial(f"point {number} ({name})"):
            child = resume_run(cwd, *words, plan=Plan(kill_at=number))
            assert child.wait() == -signal.SIGKILL, f"not killed: {child.errors}"
            require_valid(cwd / "output/run", truth)
            finish(cwd, truth, *words)
    return tally


def chosen(names: list[str], only: int | None, seed: int) -> list[tuple[int, str]]:
    """Return all points with their numbers, or a few spread over them."""
    points = list(enumerate(names, start=1))
    if only is None:
        return points
    return sorted(random.Random(seed).sample(points, only))
