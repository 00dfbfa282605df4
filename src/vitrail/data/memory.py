"""How much memory is free, and whether a data set fits in it."""

import os
import sys
from pathlib import Path

from vitrail.errors import DataError

GIB = 2**30
DECODING = 1.3
"""Peak memory while pictures are decoded, as a multiple of their decoded bytes."""
CGROUP = Path("/sys/fs/cgroup")


def require_memory(count: int, image_hw: tuple[int, int], n_channels: int) -> None:
    """Refuse to decode more images than fit in memory.

    Raises:
        DataError: they do not fit; the message gives both sizes.
    """
    height, width = image_hw
    needed, free = int(count * height * width * n_channels * DECODING), available_memory()
    if free is not None and needed > free:
        raise DataError(
            f"{count:,} images of {height} x {width} pixels need {needed / GIB:.1f} GiB of memory, "
            f"but {free / GIB:.1f} GiB are free: lower --image_size or --num_train_images"
        )


def available_memory() -> int | None:
    """Return the number of bytes that this process can still allocate; None if it is unknown.

    That is the minimum of the machine's free memory, the rest of the control group's limit
    (containers), and the rest of the address space's limit (``ulimit -v``).
    """
    if not sys.platform.startswith("linux"):
        return None
    limits = [_machine_memory(), _group_memory(), _address_space()]
    return min((limit for limit in limits if limit is not None), default=None)


def _machine_memory() -> int | None:
    """Return MemAvailable of /proc/meminfo."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_memory() -> int | None:
    """Return the rest of the control group's limit (version 2); the file cache is not counted."""
    limit, used = _read(CGROUP / "memory.max").strip(), _read(CGROUP / "memory.current").strip()
    if not (limit.isdecimal() and used.isdecimal()):
        return None
    statistics = dict(line.split() for line in _read(CGROUP / "memory.stat").splitlines())
    return max(0, int(limit) - int(used) + int(statistics.get("inactive_file", 0)))


def _address_space() -> int | None:
    """Return the rest of the limit on address space."""
    import resource  # not on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _read("/proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return max(0, limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE"))


def _read(path: str | Path) -> str:
    """Return the content of a system file; empty if it does not exist."""
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
