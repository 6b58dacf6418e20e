"""What the threads of a replica work at, and for how long each has made no progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Activity:
    """One piece of work of one thread."""

    def __init__(self, name: str, excused_until: Callable[[], float], clock: Callable[[], float]) -> None:
        self.name = name
        self._clock = clock
        self._progressed = clock()
        self._excused_until = excused_until

    def progress(self) -> None:
        self._progressed = self._clock()

    def stalled_s(self) -> float:
        """Return the seconds since it last made progress, or could not be expected to make any."""
        now = self._clock()
        self._progressed = max(self._progressed, self._excused_until())
        return max(0.0, now - self._progressed)


class Activities:
    """Thread-safe. Waiting for what others do, as for room in a pool, is no activity. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running: set[Activity] = set()

    @contextmanager
    def working(self, name: str, excused_until: Callable[[], float] = lambda: 0.0) -> Iterator[Activity]:
        """Count what is done inside as work that has to make progress.

        `excused_until` returns the time of the clock until which none could be made.
        """
        activity = Activity(name, excused_until, self._clock)
        with self._lock:
            self._running.add(activity)
        try:
            yield activity
        finally:
            with self._lock:
                self._running.discard(activity)

    def stalled(self) -> dict[str, float]:
        """Return the seconds without progress of everything that runs, by name; the longest of those of one name."""
        with self._lock:
            running = list(self._running)
        stalled: dict[str, float] = {}
        for activity in running:
            stalled[activity.name] = max(stalled.get(activity.name, 0.0), activity.stalled_s())
        return stalled
