"""How long jobs take, learned from those that finished: progress, predicted waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from disagg_ray.config.schema import Config
from disagg_ray.http.store import Job
from disagg_ray.progress.events import Event

WEIGHT = 0.3
"""Of the latest job, in what is learned."""
DENOISE_SHARE = 0.9
"""Of a job's seconds, until one has finished."""
MOST = 99
"""Per cent of a job that is not completed."""


class Pace:
    """Predicts the seconds of each stage from a request's size."""

    def __init__(self, config: Config) -> None:
        self._has_steps = {name: "denoise" in stage.blocks for name, stage in config.stages.items()}
        self._rates: dict[str, float] = {}
        """Seconds of a stage for one pixel of one frame, and for one step where it has steps."""

    def learn(self, job: Job) -> None:
        for stage, seconds in job.stage_seconds.items():
            rate = seconds / self._work(stage, job.settings)
            before = self._rates.get(stage, rate)
            self._rates[stage] = before + WEIGHT * (rate - before)

    def predict(self, job: Job) -> dict[str, float]:
        """Return the seconds of each stage; empty until one job has finished."""
        return {stage: rate * self._work(stage, job.settings) for stage, rate in self._rates.items()}

    def shares(self, job: Job) -> dict[str, float]:
        """Return each stage's share of a job's seconds; they sum to 1."""
        seconds = self.predict(job)
        if seconds.keys() < self._has_steps.keys():
            others = len(self._has_steps) - sum(self._has_steps.values())
            seconds = {
                stage: DENOISE_SHARE if steps else (1 - DENOISE_SHARE) / others
                for stage, steps in self._has_steps.items()
            }
        total = sum(seconds.values()) or 1.0
        return {stage: seconds[stage] / total for stage in self._has_steps}

    def progress(self, job: Job, stages: Mapping[str, Event]) -> int:
        """Return how far a job is, in per cent, from the latest event of each stage."""
        done = sum(share * _fraction(stages[name]) for name, share in self.shares(job).items() if name in stages)
        return min(MOST, int(100 * done))

    @property
    def nothing_s(self) -> float | None:
        """Return the wait where nothing is left; None: no job has finished, which would tell how long one takes."""
        return 0.0 if self._rates else None

    def waits(self, jobs: Iterable[Job], replicas: Mapping[str, int]) -> Iterator[float | None]:
        """Yield for each of several jobs the seconds until it is finished; the slowest stage decides."""
        left: dict[str, float] = {}
        for job in jobs:
            for stage, seconds in self.predict(job).items():
                share = seconds * (1 - job.progress / 100)
                left[stage] = left.get(stage, 0.0) + share / max(replicas.get(stage, 1), 1)
            yield max(left.values(), default=self.nothing_s)

    def _work(self, stage: str, settings: Mapping[str, Any]) -> float:
        work: float = settings["height"] * settings["width"] * settings["num_frames"]
        return work * settings["num_inference_steps"] if self._has_steps.get(stage) else work


def _fraction(event: Event) -> float:
    """Return how far a stage is."""
    if event.state in ("done", "publishing"):
        return 1.0
    return event.step / event.steps if event.steps else 0.0
