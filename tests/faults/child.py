"""The command line in a process of its own, forked from a warm one, with faults built in."""

import errno
import multiprocessing
import os
import random
import shlex
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.points import Points, fail_at, kill_at

WORDS = shlex.split(
    "train --preset quick --device cpu --patch_size 8 --embed_dim 16 --n_attention_heads 2 "
    "--n_layers 1 --batch_size 40 --num_train_images 90 --num_test_images 30 --validation_images "
    "50 --randaugment_ops 1 --dropout 0.1 --ema_decay 0.9 --precision float32"
)
STEPS = 3
"""Updates in one epoch of it."""


@dataclass(frozen=True)
class Plan:
    """The faults of a child process."""

    kill_at: int = 0
    """SIGKILL at this point (see points.py); 0 for never."""
    fail_at: int = 0
    """A system error at this point."""
    error: int = errno.ENOSPC
    """Its errno."""
    folder_flush: int = 0
    """The errno of every fsync of a folder; 0 for none."""
    points: bool = False
    """Write the names of all points into points.txt."""
    clock: int | None = None
    """Seed of a clock that jumps."""
    user: int | None = None
    """Run as this user."""
    slow_save: bool = False
    """Saving takes a minute once there is a file ``slow`` in the working folder."""
    pictures: bool = False
    """Draw the plots at the end, which takes longer than all the rest."""
    slow_after: int = 1_000_000
    """Updates after which each one is slowed down: the run then lives until a signal comes."""
    pause: float = 0.2
    """Length of the pause after each of them, in seconds."""


class Child:
    """A running command line."""

    def __init__(self, cwd: Path, *words: str, plan: Plan | None = None) -> None:
        cwd.mkdir(parents=True, exist_ok=True)
        self.cwd = cwd
        self.name = f"{len(list(cwd.glob('*.err'))):03}"
        target = (run_child, (words, cwd, self.name, plan or Plan()))
        self.process = forkserver().Process(target=target[0], args=target[1])
        self.process.start()

    def wait(self, seconds: float = 300) -> int:
        """Wait for its end and return its exit code, negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds:g} s: {self.errors}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Send it a signal if it is alive."""
        if self.process.pid is not None and self.alive:
            os.kill(self.process.pid, number)

    @property
    def alive(self) -> bool:
        """Whether it is running."""
        return self.process.is_alive()

    @property
    def errors(self) -> str:
        """Its standard error."""
        path = self.cwd / f"{self.name}.err"
        return path.read_text() if path.exists() else ""

    def until(self, updates: int, seconds: float = 300) -> None:
        """Wait until it has logged this many updates, or has ended."""
        deadline = time.monotonic() + seconds
        log = self.cwd / f"{self.name}.losses"
        while self.alive and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= updates:
                return
            time.sleep(0.002)


def forkserver() -> Any:
    """Return the context that forks from one warm, single-threaded process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.warm"])
    folders = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(":")]
    os.environ["PYTHONPATH"] = ":".join(dict.fromkeys(filter(None, folders)))
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    return context


def run_child(words: tuple[str, ...], cwd: Path, name: str, plan: Plan) -> None:
    """Run the command line with its faults. Runs in the child."""
    import vitrail.cli
    from faults.warm import take_few_images  # loaded already, unless the server could not

    take_few_images()
    for descriptor, ending in ((1, "out"), (2, "err")):
        file = os.open(cwd / f"{name}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.chdir(cwd)
    log_losses(cwd / f"{name}.losses", plan)
    set_up(plan, cwd)
    mark_start(cwd / f"{name}.ready")
    sys.exit(vitrail.cli.main(words))


def set_up(plan: Plan, cwd: Path) -> None:
    """Install the faults."""
    import vitrail.training.run

    if plan.user is not None:
        os.setgroups([])
        os.setgid(plan.user)
        os.setuid(plan.user)
    if plan.kill_at:
        Points(cwd / "output", kill_at(plan.kill_at)).install(setattr)
    if plan.fail_at:
        Points(cwd / "output", fail_at(plan.fail_at, plan.error)).install(setattr)
    if plan.folder_flush:
        refuse_folders(plan.folder_flush)
    if plan.points:
        file = os.open(cwd / "points.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        names = Points(
            cwd / "output", lambda _, name: os.write(file, f"{name}\n".encode()) and None
        )
        names.install(setattr)
    if plan.clock is not None:
        jump(plan.clock)
    if not plan.pictures:
        vitrail.training.run.plot_run = lambda *_: []
    if plan.slow_save:
        slow_down(cwd)


def refuse_folders(error: int) -> None:
    """Make fsync fail for folders but not for files."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        real(descriptor)

    os.fsync = fsync


def mark_start(path: Path) -> None:
    """Make a file when the command begins: from then on the command handles signals."""
    import vitrail.cli

    real = vitrail.cli.run

    def run(command: str, words: Any) -> int:
        path.touch()
        return real(command, words)

    vitrail.cli.run = run


def log_losses(path: Path, plan: Plan) -> None:
    """Log every update's number and loss, to the bit, before anything is saved of it."""
    import vitrail.training.run

    real = vitrail.training.run.train
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def logged(*args: Any) -> Any:
        for count, update in enumerate(real(*args)):
            os.write(file, f"{update.step} {update.loss.hex()}\n".encode())
            yield update
            time.sleep(plan.pause if count >= plan.slow_after else 0)

    vitrail.training.run.train = logged  # type: ignore[assignment]


def jump(seed: int) -> None:
    """Make the wall clock jump by up to a century, and the monotonic clock skip or stop."""
    random_ = random.Random(seed)
    day, monotonic, counter = time.time, time.monotonic, time.perf_counter
    leap = [0.0]

    def leaping() -> float:
        leap[0] += random_.choice([0.0, 0.0, 0.0, 1e-9, 5.0, 3600.0])
        return leap[0]

    stands = random_.random() < 0.3
    start = counter()
    time.time = lambda: day() + random_.uniform(-1, 1) * 3e9  # type: ignore[assignment]
    time.strftime = lambda form: (  # type: ignore[assignment]
        real_strftime(form, time.gmtime(random_.uniform(0, 4e9)))
    )
    time.monotonic = lambda: monotonic() + leaping()  # type: ignore[assignment]
    time.perf_counter = lambda: start if stands else counter() + leaping()  # type: ignore[assignment]


real_strftime = time.strftime


def slow_down(cwd: Path) -> None:
    """Make saving take a minute once requested."""
    import vitrail.training.run

    real = vitrail.training.run.save_checkpoint

    def slow(*args: Any, **kwargs: Any) -> None:
        if (cwd / "slow").exists():
            (cwd / "saving").touch()
            time.sleep(60)
        real(*args, **kwargs)

    vitrail.training.run.save_checkpoint = slow
