"""How long jobs take, learned from those that finished: progress, predicted waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """Predicts the seconds of each stage from a request's size.

    A service may be taken down and put up again with other stages: then what was learned is forgotten.
    """

    def __init__(self, config: Callable[[], Config]) -> None:
        """Predict for the configuration that is in force at each call."""
        self._config = config
        self._learned: dict[str, float] = {}
        """Seconds of a stage for one pixel of one frame, and for one step where it has steps."""

    @property
    def _has_steps(self) -> dict[str, bool]:
        return {name: "denoise" in stage.blocks for name, stage in self._config().stages.items()}

    @property
    def _rates(self) -> dict[str, float]:
        """What was learned, unless of other stages."""
        return self._learned if self._learned.keys() == self._config().stages.keys() else {}

    def learn(self, job: Job) -> None:
        """Learn from a finished job, unless other stages made it."""
        if job.stage_seconds.keys() != self._config().stages.keys():
            return
        rates = {stage: seconds / self._work(stage, job.settings) for stage, seconds in job.stage_seconds.items()}
        before = self._rates or rates
        self._learned = {stage: before[stage] + WEIGHT * (rate - before[stage]) for stage, rate in rates.items()}

    def predict(self, job: Job) -> dict[str, float]:
        """Return the seconds of each stage; empty until one job has finished."""
        return {stage: rate * self._work(stage, job.settings) for stage, rate in self._rates.items()}

    def shares(self, job: Job) -> dict[str, float]:
        """Return each stage's share of a job's seconds; they sum to 1."""
        has_steps, seconds = self._has_steps, self.predict(job)
        if not seconds:
            others = len(has_steps) - sum(has_steps.values())
            seconds = {
                stage: DENOISE_SHARE if steps else (1 - DENOISE_SHARE) / others for stage, steps in has_steps.items()
            }
        total = sum(seconds.values()) or 1.0
        return {stage: seconds[stage] / total for stage in has_steps}

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
        work: float = settings["height"] * settings["width"] * settings.get("num_frames", 1)
        return work * settings["num_inference_steps"] if self._has_steps.get(stage) else work


def _fraction(event: Event) -> float:
    """Return how far a stage is."""
    if event.state in ("done", "publishing"):
        return 1.0
    return event.step / event.steps if event.steps else 0.0
