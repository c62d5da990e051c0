"""The memory of this process: keeping what is freed instead of giving it back to the system, the peak, and the end.

A training step allocates and frees the same large buffers again and again. By default the C library takes each from
the system and returns it, and the system clears every page anew: a quarter to a half of a character-level update.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kfacrnn.errors import UserError, first_line

# Of glibc's malloc.h; other C libraries have no mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
_SHORTAGES = ("can't allocate memory", "out of memory", "overflow")  # torch's words


def keep_freed_memory() -> bool:
    """For the whole process, from now on. Returns whether the C library can; peak memory grows by what is kept."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, _LARGEST) for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def peak_rss_mb() -> float:
    """Largest resident memory so far. The kernel's ru_maxrss also holds that of the process which started this one."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    unit = 1024**2 if platform.system() == "Darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@contextmanager
def shortage_explained(what: str) -> Iterator[None]:
    """Sizes for which there is no memory become one line: `what` is too large."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error).lower() for sign in _SHORTAGES):
            raise
        raise UserError(f"not enough memory for {what} of these sizes: {first_line(error)}") from error
