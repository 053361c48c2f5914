"""Memory and time that this process takes."""

import ctypes
import os
import resource
import sys
import time
from pathlib import Path

MMAP_BYTES = 2**20
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def return_freed_memory() -> None:
    """Make the C library give freed memory back, so that peak memory is what is in use.

    By default glibc keeps freed pieces of up to 32 MiB for later; a run then takes a quarter more than it uses. From
    now on it keeps small ones only. They lie wherever there was room, and every block would touch other places: so
    this is called behind every block, and gives back what is free by then.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        trim = getattr(library, "malloc_trim", None)  # of glibc, which has the other one too
        if trim is not None:
            library.mallopt(_MMAP_THRESHOLD, MMAP_BYTES)
            trim(ctypes.c_size_t(0))


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far, mapped pages included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int | None:
    """Resident memory of this process now, or None where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else None


def cpu_seconds() -> float:
    """Processor time of this process so far, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Clock:
    """Time and processor time of this process since the run began."""

    def __init__(self) -> None:
        self._started, self._cpu_started = time.perf_counter(), cpu_seconds()
        self.times: dict[str, float] = {}
        self._marked = self._started

    def mark(self, stage: str) -> None:
        """A stage is over."""
        now = time.perf_counter()
        self.times[stage], self._marked = now - self._marked, now

    @property
    def seconds(self) -> float:
        """Up to the last mark."""
        return self._marked - self._started

    def spent(self) -> dict[str, float]:
        """Everything up to now."""
        return {
            "seconds": time.perf_counter() - self._started,
            "cpu_seconds": cpu_seconds() - self._cpu_started,
            "peak_rss_bytes": peak_rss_bytes(),
        }
