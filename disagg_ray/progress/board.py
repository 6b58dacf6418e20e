"""The progress of every request, from events, for displays."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from disagg_ray.progress.events import FINAL, Event

PACE_STEPS = 16
"""Latest steps that the seconds of a step are estimated from: a request's first steps are slower."""
PACE_VIDEOS = 64
REMEMBERED = 10_000
"""Finished requests that are remembered, to ignore their late events."""


@dataclass
class Track:
    """One stage of one request."""

    event: Event
    """The latest."""
    since: float
    """Time its state was reached, by this process's monotonic clock."""
    seen: float
    """Time of the latest event, by the same clock."""
    pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=PACE_STEPS))
    """Times steps were done, by the replica's clock."""

    def update(self, event: Event, now: float) -> None:
        if (event.state, event.attempt, event.replica) != (self.event.state, self.event.attempt, self.event.replica):
            self.since = now
            self.pace.clear()
        self.event, self.seen = event, now
        if event.state == "running" and event.steps:
            self.pace.append((event.time, event.step))

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds of the remaining steps; None: not known yet."""
        if not self.pace:
            return None
        (began, first), (ended, last) = self.pace[0], self.pace[-1]
        if last <= first or ended <= began:
            return None
        left = (ended - began) / (last - first) * (self.event.steps - last)
        return max(left - (now - self.seen), 0.0)


@dataclass(frozen=True)
class Totals:
    """Progress of all requests together."""

    done: int
    failed: int
    total: int | None
    running: int
    """Requests that a replica computes."""
    waiting: dict[str, int]
    """Requests that wait for a replica, by stage."""
    videos_per_min: float | None
    seconds_left: float | None
    makes: str = "video"
    """What comes of a request."""


class Board:
    """Takes events from any thread and keeps the latest of each stage of each request."""

    def __init__(self, total: int | None, makes: str = "video") -> None:
        self.lock = threading.Lock()
        """Also held while returned tracks are read."""
        self.requests: dict[str, dict[str, Track]] = {}
        """By request, then by stage, in the order they began, without finished ones."""
        self._total, self._makes = total, makes
        self._ok: Counter[bool] = Counter()
        self._ended: dict[str, bool] = {}
        self._times: deque[float] = deque(maxlen=PACE_VIDEOS)  # the first event, then videos that finished

    def on_event(self, event: Event) -> Track | None:
        """Record an event; return None if it came too late. The lock must be held."""
        now = time.monotonic()
        if not self._times:
            self._times.append(now)
        if event.request_id in self._ended:
            return None
        tracks = self.requests.setdefault(event.request_id, {})
        track = tracks.get(event.stage)
        if track is not None and event.attempt < track.event.attempt:
            return None
        if track is None:
            track = tracks[event.stage] = Track(event, now, now)
        track.update(event, now)
        if event.state in FINAL:
            del tracks[event.stage]
        return track

    def finished(self, request_id: str, ok: bool) -> None:
        """Record the end of a request. The lock must be held."""
        self.requests.pop(request_id, None)
        self._times.append(time.monotonic())
        self._ok[ok] += 1
        self._ended[request_id] = ok
        if len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def active(self) -> list[Track]:
        """Return the track of each request that a replica computes, oldest request first. The lock must be held."""
        found = []
        for tracks in self.requests.values():
            working = [track for track in tracks.values() if track.event.state != "waiting"]
            found += working[-1:]
        return found

    def totals(self) -> Totals:
        """Return the progress of all requests. The lock must be held."""
        waiting = Counter(
            stage
            for tracks in self.requests.values()
            for stage, track in tracks.items()
            if track.event.state == "waiting"
        )
        done, failed = self._ok[True], self._ok[False]
        rate = self._videos_per_s()
        left = None
        if rate and self._total is not None:
            left = max((self._total - done - failed) / rate - (time.monotonic() - self._times[-1]), 0.0)
        per_min = rate * 60 if rate else None
        return Totals(done, failed, self._total, len(self.active()), dict(waiting), per_min, left, self._makes)

    def _videos_per_s(self) -> float | None:
        if len(self._times) < 2 or self._times[-1] <= self._times[0]:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])
