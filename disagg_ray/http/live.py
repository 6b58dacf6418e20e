"""Jobs that this process runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from disagg_ray.driver.handle import Handle
from disagg_ray.http.pace import Pace
from disagg_ray.http.store import Job, Status
from disagg_ray.progress.events import Event


@dataclass(eq=False)
class Live:
    """A job that this process runs."""

    job: Job
    handle: Handle | None = None
    stages: dict[str, Event] = field(default_factory=dict)
    """The latest event of each."""
    subscribers: set[Callable[[Job], None]] = field(default_factory=set)
    changed: bool = False
    """Since its progress was last written."""

    def view(self, job: Job, pace: Pace) -> Job:
        """Return a job as its events say it is, ahead of the database."""
        if job.is_finished or not self.stages:
            return job
        running = any(event.state != "waiting" for event in self.stages.values())
        status: Status = "in_progress" if running and job.status == "queued" else job.status
        stages = {name: [event.state, event.step, event.steps] for name, event in self.stages.items()}
        progress = max(job.progress, pace.progress(job, self.stages))
        return replace(job, progress=progress, status=status, stages=stages)
