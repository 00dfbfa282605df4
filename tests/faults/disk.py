"""A disk that fails, is full, is read-only or loses the folder; a clock that jumps."""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.child import STEPS, Plan
from faults.folder import (
    finish,
    losses,
    require_end,
    require_one_line,
    require_valid,
    resume_run,
    undisturbed,
)
from faults.kills import chosen, points_of
from faults.tally import Tally

NOBODY = 65534


def every_error(folder: Path, *, epochs: int, only: int | None = None, seed: int = 1) -> Tally:
    """Make each write, flush, rename and removal fail once; then resume."""
    tally = Tally("An error of the disk at a write, flush, rename or removal")
    words = ("--epochs", str(epochs))
    truth = undisturbed(*words)
    for number, name in chosen(points_of(*words), only, seed):
        cwd = folder / f"point-{number}"
        code = (errno.ENOSPC, errno.EIO, errno.EROFS)[number % 3]
        with tally.trial(f"{errno.errorcode[code]} at point {number} ({name})"):
            child = resume_run(cwd, *words, plan=Plan(fail_at=number, error=code))
            if child.wait() != 0:
                require_one_line(child)
                assert os.strerror(code) in child.errors, child.errors
            require_valid(cwd / "output/run", truth)
            finish(cwd, truth, *words)
    return tally


def folders_not_flushed(folder: Path, *, epochs: int = 3) -> Tally:
    """Make fsync of folders fail, as CIFS and FUSE do: that is not a disk error."""
    tally = Tally("A file system that does not flush folders")
    words = ("--epochs", str(epochs))
    truth = undisturbed(*words)
    for code in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
        name = errno.errorcode[code]
        with tally.trial(name):
            child = resume_run(folder / name, *words, plan=Plan(folder_flush=code))
            assert child.wait() == 0, child.errors
            require_end(folder / name, truth)
    with tally.trial("EIO stays an error"):
        child = resume_run(folder / "EIO", *words, plan=Plan(folder_flush=errno.EIO))
        require_one_line(child)
        assert os.strerror(errno.EIO) in child.errors, child.errors
    return tally


def full_disk(folder: Path, *, sizes: int, epochs: int = 3, seed: int = 2) -> Tally:
    """Train on disks of some KiB, too small in most cases; then free some space."""
    tally = Tally("A full disk (tmpfs)")
    truth = undisturbed("--epochs", str(epochs))
    words = ("--epochs", str(epochs), "--keep_checkpoints", "2")
    random_ = random.Random(seed)
    for number in range(sizes):
        kib = 4 * random_.randint(1, 200)
        cwd = folder / f"disk-{number}"
        (cwd / "output").mkdir(parents=True)
        if (reason := mount(cwd / "output", kib)) is not None:
            tally.skipped = reason
            return tally
        try:
            with tally.trial(f"{kib} KiB"):
                child = resume_run(cwd, *words, plan=Plan(pictures=True))
                if child.wait() != 0:
                    require_one_line(child)
                    assert "No space left on device" in child.errors, child.errors
                require_valid(cwd / "output/run", truth)
                mount(cwd / "output", 65536, "remount,")
                finish(cwd, truth, *words)
        finally:
            subprocess.run(["umount", "-l", str(cwd / "output")], check=True)
    return tally


def mount(folder: Path, kib: int, option: str = "") -> str | None:
    """Mount a small tmpfs, or return why that is impossible."""
    if os.name != "posix" or os.geteuid() != 0:
        return "mounting needs root"
    command = ["mount", "-t", "tmpfs", "-o", f"{option}size={kib}k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"mounting is not allowed: {done.stderr.strip()}"


def read_only(folder: Path, *, times: int, epochs: int = 12, seed: int = 3) -> Tally:
    """Make the folder read-only while a run trains, then writable again."""
    tally = Tally("A folder that becomes read-only")
    words = ("--epochs", str(epochs))
    user = NOBODY if os.geteuid() == 0 else None  # root can write anywhere
    needed = (*folder.parents, *Path(sys.prefix, "x").parents, *Path(__file__).parents)
    closed = [path for path in needed if not open_to_all(path)]
    if user is not None and closed:
        tally.skipped = f"{closed[0]} is closed to other users"
        return tally
    truth = undisturbed(*words)
    random_ = random.Random(seed)
    for number in range(times):
        cwd = folder / f"disk-{number}"
        cwd.mkdir(parents=True)
        if user is not None:
            os.chown(cwd, user, user)
        plan = Plan(user=user)
        with tally.trial(f"time {number}"):
            updates = random_.randint(1, epochs // 2 * STEPS)
            child = resume_run(cwd, *words, plan=Plan(user=user, slow_after=updates))
            child.until(updates)
            with locked(cwd / "output"):
                if child.wait() != 0:
                    require_one_line(child)
                    assert "Permission denied" in child.errors, child.errors
                require_valid(cwd / "output/run", truth)
                require_one_line(resume_run(cwd, *words, plan=plan))
            child = resume_run(cwd, *words, plan=plan)
            assert child.wait() == 0, child.errors
            require_end(cwd, truth)
    return tally


def open_to_all(path: Path) -> bool:
    """Return whether every user can enter a folder."""
    return bool(path.stat().st_mode & 0o001)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and everything in it read-only."""
    inside = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in inside:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in filter(Path.exists, inside):
            path.chmod(0o755)


def removed(folder: Path, *, times: int, epochs: int = 12, seed: int = 4) -> Tally:
    """Remove the run folder while a run trains: it continues and saves, or stops with one error."""
    tally = Tally("The run folder removed under the run")
    words = ("--epochs", str(epochs))
    truth = undisturbed(*words)
    random_ = random.Random(seed)
    for number in range(times):
        cwd = folder / f"run-{number}"
        with tally.trial(f"time {number}"):
            updates = random_.randint(1, epochs // 2 * STEPS)
            child = resume_run(cwd, *words, plan=Plan(slow_after=updates))
            child.until(updates)
            shutil.rmtree(cwd / "output/run", ignore_errors=True)
            if child.wait() == 0:
                assert losses(cwd) == truth.losses, "different losses"
                assert require_valid(cwd / "output/run", truth) == truth.steps, "not saved"
            else:
                require_one_line(child)
                shutil.rmtree(cwd / "output/run", ignore_errors=True)
            finish(cwd, truth, *words, best=False)
    return tally


def clock(folder: Path, *, times: int) -> Tally:
    """Make the wall clock jump by decades at every call, and the monotonic clock skip or stop."""
    tally = Tally("A clock that jumps")
    words = ("--epochs", "4")
    truth = undisturbed(*words)
    for seed in range(times):
        cwd = folder / f"clock-{seed}"
        with tally.trial(f"clock {seed}"):
            child = resume_run(cwd, *words, plan=Plan(clock=seed))
            child.until(2 * STEPS)
            if seed % 2:
                child.signal(9)
            child.wait()
            child = resume_run(cwd, *words, plan=Plan(clock=seed + 1))
            assert child.wait() == 0, child.errors
            require_end(cwd, truth)
    return tally
