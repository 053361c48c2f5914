"""Time, time of processor and memory of a run."""

import time

from mezzotint.pipeline.report import cpu_seconds, peak_rss_bytes


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
