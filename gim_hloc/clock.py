"""Wall time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Elapsed wall time in seconds."""
        return time.perf_counter() - self._start


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of the block to what stands under a name."""
    watch = Stopwatch()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + watch.seconds
