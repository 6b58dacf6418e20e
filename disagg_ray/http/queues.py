"""Queues of unfinished jobs as they were a moment ago: how many come before a job, and how long they take."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from disagg_ray.http.runner import Runner
from disagg_ray.http.store import Job, Store

FRESH_S = 1.0
"""Longest age of what was read."""


@dataclass(frozen=True)
class Place:
    """Where a job is in its model's queue."""

    ahead: int
    """Jobs that come before it."""
    wait_s: float | None
    """Predicted seconds until it is finished; None: no job has shown yet how long one takes."""


class Queues:
    """What is read once for many questions: of each model, the unfinished jobs of all processes in order."""

    def __init__(self, store: Store, runners: Mapping[str, Runner]) -> None:
        self._store, self._runners = store, runners
        self._read = -math.inf
        self._places: dict[str, Place] = {}
        self._ends: dict[str, Place] = {}
        """Of the next job, by model."""

    def read(self) -> list[Job]:
        """Read unfinished jobs of all models, in the order in which they are to run."""
        unfinished, places, ends = self._store.unfinished(), dict[str, Place](), dict[str, Place]()
        for model, runner in self._runners.items():
            jobs = [job for job in unfinished if job.model == model]
            waits = list(runner.pace.waits(jobs, runner.link.replicas))
            places |= {job.id: Place(ahead, wait) for ahead, (job, wait) in enumerate(zip(jobs, waits, strict=True))}
            ends[model] = Place(len(jobs), waits[-1] if waits else runner.pace.nothing_s)
        self._places, self._ends, self._read = places, ends, time.monotonic()
        return unfinished

    def place(self, job: Job) -> Place:
        """Return where an unfinished job is."""
        self._refresh()
        if (known := self._places.get(job.id)) is not None:
            return known
        end, runner = self._ends[job.model], self._runners[job.model]  # it has come since
        own_s = next(iter(runner.pace.waits([job], runner.link.replicas)))
        return Place(end.ahead, end.wait_s + own_s if end.wait_s is not None and own_s is not None else own_s)

    def seconds_each(self, model: str) -> float | None:
        """Return the predicted seconds between two jobs of a model that end."""
        self._refresh()
        end = self._ends[model]
        return end.wait_s / max(end.ahead, 1) if end.wait_s is not None else None

    def _refresh(self) -> None:
        if time.monotonic() > self._read + FRESH_S:
            self.read()
