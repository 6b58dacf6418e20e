"""One attempt to compute a stage for a request, from the scheduler's queue to the replica's answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal

from disagg_ray.driver.calls import Actor
from disagg_ray.driver.fleet import Fleet
from disagg_ray.replica.messages import Reply, Task
from disagg_ray.request import ResolvedRequest
from disagg_ray.scheduling.scheduler import Assignment, Job
from disagg_ray.scheduling.work import measure

AttemptState = Literal["waiting", "prefetching", "running", "done", "failed", "cancelled"]


class Attempt:
    """Call `run` once; cancel it to abandon the attempt.

    It waits in the stage's queue, prefetches its inputs at the replica that the scheduler assigns, which may change
    meanwhile, and runs there once the scheduler says so.
    """

    def __init__(
        self, fleet: Fleet, stage: str, number: int, request: ResolvedRequest, sequence: int, avoid: frozenset[str]
    ) -> None:
        """Prepare attempt `number` (0 is the first); it goes to replicas in `avoid` only if there are no others."""
        self.number = number
        self.state: AttemptState = "waiting"
        self.actor: Actor | None = None
        """The replica that it was last assigned to."""
        self.num_steps = 0
        """Denoising steps that are known to be done."""
        self.has_run = False
        """A replica was asked to compute it."""
        self._created = time.monotonic()
        work, shape = measure(request, fleet.config.stages[stage].blocks)
        self._job = Job(request.id, work, shape, request.priority, sequence, self._assign, avoid)
        self._fleet, self._scheduler = fleet, fleet.schedulers[stage]
        self._assignment: Assignment | None = None
        self._assigned = asyncio.Event()
        """Set when the assignment has changed."""
        self._task: Task | None = None
        """At `actor`, which has to release its slots."""
        self._prefetch: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @property
    def seconds(self) -> float:
        """Seconds since it was created."""
        return time.monotonic() - self._created

    async def run(self, make_task: Callable[[], Task]) -> tuple[Task, Reply]:
        """Have a replica compute the stage; from then on the caller releases the output's slots there.

        `make_task` is called whenever a replica is assigned.

        Raises:
            DisaggError: what failed a prefetch or the computation, or what `make_task` raised.
        """
        self._scheduler.push(self._job, self._created)
        try:
            actor, task = await self._wait_for_replica(make_task)
            self.state, self.has_run = "running", True
            reply: Reply = await self._fleet.ask(actor, "run", task)
            self._scheduler.finish(self._job, time.monotonic(), reply.timing.compute_s + reply.timing.publish_s)
            self._fleet.note_success(actor)
            self.state, self._task = "done", None
            return task, reply
        except asyncio.CancelledError:
            self.state = "cancelled"
            raise
        except BaseException:
            self.state = "failed"
            raise
        finally:
            self._scheduler.withdraw(self._job, time.monotonic())
            self._leave_replica()

    def _assign(self, assignment: Assignment | None) -> None:
        self._assignment = assignment
        self._assigned.set()

    async def _wait_for_replica(self, make_task: Callable[[], Task]) -> tuple[Actor, Task]:
        """Follow the scheduler's assignments, prefetching at each, until one says to run."""
        while True:
            await self._next_assignment()
            assignment = self._assignment
            if self.actor is not None and (assignment is None or assignment.replica != self.actor.id):
                self._leave_replica()
            if assignment is None:
                continue
            if self._task is None:
                self.state, self.actor = "prefetching", self._fleet.actor(assignment.replica)
                self._task = make_task()
            assert self.actor is not None
            if self._prefetch is None:  # even if it runs at once: a replica lost before `run` has computed nothing
                self._prefetch = asyncio.ensure_future(self._fleet.ask(self.actor, "prefetch", self._task))
                self._prefetch.add_done_callback(lambda call: call.cancelled() or call.exception())  # retrieved
            if assignment.run:
                await self._prefetch
                return self.actor, self._task

    async def _next_assignment(self) -> None:
        """Wait until the assignment changes; raise what fails the prefetch meanwhile."""
        changed = asyncio.ensure_future(self._assigned.wait())
        try:
            if self._prefetch is not None:
                await asyncio.wait({changed, self._prefetch}, return_when=asyncio.FIRST_COMPLETED)
                if self._prefetch.done() and not changed.done():
                    self._prefetch.result()
            await changed
            self._assigned.clear()
        finally:
            changed.cancel()

    def _leave_replica(self) -> None:
        """Abandon the task at its replica: it stops within a denoising step, and its slots are freed."""
        if self._prefetch is not None:
            self._prefetch.cancel()
        if self._task is not None:
            assert self.actor is not None
            self._fleet.send(self.actor, "release", self._task.key)
        self._task = self._prefetch = None
