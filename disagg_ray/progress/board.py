"""Where every request stands, learned from events; what displays show."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from disagg_ray.progress.events import FINAL, Event

PACE_STEPS = 16
"""How many of the latest steps the time of one is learned from: a request's first ones are slower than the rest."""
PACE_VIDEOS = 64
REMEMBERED = 10_000
"""Finished requests whose late events are known as such."""


@dataclass
class Track:
    """One stage of one request."""

    event: Event
    """The latest."""
    since: float
    """When its state was reached, on this process's monotonic clock."""
    seen: float
    """When the latest event came, on the same clock."""
    pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=PACE_STEPS))
    """When steps were done, on the replica's clock."""

    def update(self, event: Event, now: float) -> None:
        if (event.state, event.attempt, event.replica) != (self.event.state, self.event.attempt, self.event.replica):
            self.since = now
            self.pace.clear()
        self.event, self.seen = event, now
        if event.state == "running" and event.steps:
            self.pace.append((event.time, event.step))

    def seconds_left(self, now: float) -> float | None:
        """Return how long the steps left will take, None as long as that is unknown."""
        if not self.pace:
            return None
        (began, first), (ended, last) = self.pace[0], self.pace[-1]
        if last <= first or ended <= began:
            return None
        left = (ended - began) / (last - first) * (self.event.steps - last)
        return max(left - (now - self.seen), 0.0)


@dataclass(frozen=True)
class Totals:
    """How far the whole is."""

    done: int
    failed: int
    total: int | None
    running: int
    """Requests that some replica works on."""
    waiting: dict[str, int]
    """Requests that wait for a replica, by stage."""
    videos_per_min: float | None
    seconds_left: float | None


class Board:
    """Takes events from any thread and keeps the latest of each stage of each request."""

    def __init__(self, total: int | None) -> None:
        self.lock = threading.Lock()
        """Held while the tracks it gave are read, too."""
        self.requests: dict[str, dict[str, Track]] = {}
        """By request, then by stage, in the order they began; finished requests and stages are gone."""
        self._total = total
        self._ok: Counter[bool] = Counter()
        self._ended: dict[str, bool] = {}
        self._times: deque[float] = deque(maxlen=PACE_VIDEOS)  # the first event, then videos that finished

    def on_event(self, event: Event) -> Track | None:
        """Note an event; None says that it came too late to matter. The lock must be held."""
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
        """Note that a request is over. The lock must be held."""
        self.requests.pop(request_id, None)
        self._times.append(time.monotonic())
        self._ok[ok] += 1
        self._ended[request_id] = ok
        if len(self._ended) > REMEMBERED:
            del self._ended[next(iter(self._ended))]

    def active(self) -> list[Track]:
        """Return the track of each request that a replica works on, oldest request first. The lock must be held."""
        found = []
        for tracks in self.requests.values():
            working = [track for track in tracks.values() if track.event.state != "waiting"]
            found += working[-1:]
        return found

    def totals(self) -> Totals:
        """Return how far the whole is. The lock must be held."""
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
        return Totals(done, failed, self._total, len(self.active()), dict(waiting), per_min, left)

    def _videos_per_s(self) -> float | None:
        if len(self._times) < 2 or self._times[-1] <= self._times[0]:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])
