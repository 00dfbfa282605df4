"""How much memory is free, and whether a data set fits into it."""

import os
import sys
from pathlib import Path

from vitrail.errors import DataError

GIB = 2**30
DECODING = 1.3
"""Peak memory while pictures are decoded, as a multiple of their decoded bytes."""
CGROUP = Path("/sys/fs/cgroup")


def require_memory(count: int, image_hw: tuple[int, int], n_channels: int) -> None:
    """Refuse to decode more images than fit into memory.

    Raises:
        DataError: they cannot fit; the message has the numbers.
    """
    height, width = image_hw
    needed, free = int(count * height * width * n_channels * DECODING), available_memory()
    if free is not None and needed > free:
        raise DataError(
            f"{count:,} images of {height} x {width} pixels need {needed / GIB:.1f} GiB of memory, "
            f"but {free / GIB:.1f} GiB are free: lower --image_size or --num_train_images"
        )


def available_memory() -> int | None:
    """Return the bytes that this process can still allocate; None where the system does not say.

    That is the least of what the machine has free, what the control group allows (containers), and
    what the limit on address space (``ulimit -v``) leaves.
    """
    if not sys.platform.startswith("linux"):
        return None
    limits = [machine_memory(), group_memory(), address_space()]
    return min((limit for limit in limits if limit is not None), default=None)


def machine_memory() -> int | None:
    """Return MemAvailable of /proc/meminfo."""
    for line in read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def group_memory() -> int | None:
    """Return what the control group (version 2) still allows; cached files do not count as used."""
    limit, used = read(CGROUP / "memory.max").strip(), read(CGROUP / "memory.current").strip()
    if not (limit.isdecimal() and used.isdecimal()):
        return None
    statistics = dict(line.split() for line in read(CGROUP / "memory.stat").splitlines())
    return max(0, int(limit) - int(used) + int(statistics.get("inactive_file", 0)))


def address_space() -> int | None:
    """Return what the limit on address space leaves."""
    import resource  # not on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = read("/proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return max(0, limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE"))


def read(path: str | Path) -> str:
    """Return the content of a file of the system; nothing if it is not there."""
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
