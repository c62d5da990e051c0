"""The memory of this process: keeping what is freed instead of giving it back to the system, and the peak.

A training step allocates and frees the same large buffers again and again. By default the C library takes each from
the system and returns it, and the system clears every page anew: a quarter to a half of a character-level update.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

# Of glibc's malloc.h; other C libraries have no mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
