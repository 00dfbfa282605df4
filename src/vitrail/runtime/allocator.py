"""Settings of the C library's memory allocator that suit tensors. Imports nothing heavy."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 2**31 - 1
"""Bytes: the highest that mallopt takes."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensors; return whether it will.

    Otherwise each large tensor of a training step goes back to the system and is fetched anew,
    page by page: a twentieth of the step (docs/log.md). The process then holds its peak to its end,
    so this is for whoever owns the process: the commands, not the library. Other C libraries are
    left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # The second alone would make it worse: it ends glibc's own raising of the first.
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, KEEP) and mallopt(M_TRIM_THRESHOLD, KEEP))
