"""Jobs that this process runs, as their subscribers see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from disagg_ray.driver.handle import Handle
from disagg_ray.http.pace import Pace
from disagg_ray.http.store import Job, with_progress
from disagg_ray.progress.events import Event


@dataclass(frozen=True)
class Update:
    """What subscribers of a job receive."""

    job: Job
    stages: dict[str, Event]


@dataclass(eq=False)
class Live:
    """A job that this process runs."""

    job: Job
    handle: Handle | None = None
    stages: dict[str, Event] = field(default_factory=dict)
    subscribers: set[Callable[[Update], None]] = field(default_factory=set)
    changed: bool = False
    """Since its progress was last written."""

    def update(self, job: Job, pace: Pace) -> Update:
        """Return what subscribers receive now."""
        running = any(event.state != "waiting" for event in self.stages.values())
        return Update(with_progress(job, pace.progress(job, self.stages), running=running), dict(self.stages))
