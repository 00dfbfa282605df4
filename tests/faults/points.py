"""Every write, flush, rename and removal of a process, as a point where it can be interrupted."""

import contextlib
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Points:
    """Counts the points inside a folder, and calls ``strike`` before each.

    A write is two points: before it, and when half of it is on the disk. pathlib and shutil go
    through the functions patched here; other writers (an image library) are not counted.
    """

    def __init__(self, root: Path, strike: Callable[[int, str], None]) -> None:
        self.root, self.strike, self.count = str(root.resolve()), strike, 0

    def reach(self, name: str) -> None:
        """Count a point."""
        self.count += 1
        self.strike(self.count, name)

    def holds(self, path: Any) -> bool:
        """Return whether a path is inside the folder."""
        return os.path.abspath(os.fspath(path)).startswith(self.root)  # noqa: PTH100

    def install(self, patch: Callable[[Any, str, Any], None]) -> None:
        """Install the points with ``patch(object, name, value)``."""
        real_open, real_fsync = io.open, os.fsync

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = real_open(path, mode, *args, **kwargs)
            return HalfWriter(file, self) if mode == "wb" and self.holds(path) else file

        def fsync(descriptor: int) -> None:
            self.reach("fsync")
            real_fsync(descriptor)

        patch(io, "open", opened)
        patch(os, "fsync", fsync)
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            patch(os, name, self.wrapped(name))

    def wrapped(self, name: str) -> Callable[..., Any]:
        """Return a function of os with a point before it."""
        real = getattr(os, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            # Within rmtree the name is relative to an open folder.
            if kwargs.get("dir_fd") is not None or self.holds(path):
                self.reach(name)
            return real(path, *args, **kwargs)

        return call


class HalfWriter:
    """An open file that is written to in halves."""

    def __init__(self, file: Any, points: Points) -> None:
        self.file, self.points = file, points

    def write(self, content: bytes) -> int:
        """Write, with a point before it and one in the middle."""
        self.points.reach("write")
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.points.reach("half")
        self.file.write(content[len(content) // 2 :])
        return len(content)

    def flush(self) -> None:
        """Flush, with a point before it."""
        self.points.reach("flush")
        self.file.flush()

    def fileno(self) -> int:
        """Return the descriptor."""
        return int(self.file.fileno())

    def __enter__(self) -> "HalfWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


def kill_at(wanted: int) -> Callable[[int, str], None]:
    """Send SIGKILL at one point."""

    def strike(count: int, _name: str) -> None:
        if count == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def fail_at(wanted: int, number: int) -> Callable[[int, str], None]:
    """Raise a system error at one point."""

    def strike(count: int, _name: str) -> None:
        if count == wanted:
            raise OSError(number, os.strerror(number))

    return strike
