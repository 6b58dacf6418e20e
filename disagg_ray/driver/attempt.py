"""The state of one stage in a request's run, and one attempt: from the scheduler's queue to the replica's answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from disagg_ray.driver.calls import Actor
from disagg_ray.driver.fleet import Fleet
from disagg_ray.replica.messages import Reply, Task
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import StageTiming
from disagg_ray.scheduling.job import Assignment, Job, measure
from disagg_ray.transfer.handoff import AttemptKey, Handoff


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
        self.is_over = False
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
        self._changed = asyncio.Event()
        """The assignment has changed, or a prefetch has ended."""
        self._task: Task | None = None
        """At `actor`, which has to release its slots."""
        self._prefetch: asyncio.Task[None] | None = None

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
            self.has_run = True
            reply: Reply = await self._fleet.ask(actor, "run", task)
            self._scheduler.finish(self._job, time.monotonic(), reply.timing.compute_s + reply.timing.publish_s)
            self._fleet.note_success(actor)
            self._task = None
            return task, reply
        finally:
            self.is_over = True
            self._scheduler.withdraw(self._job, time.monotonic())
            self._leave_replica()

    def _assign(self, assignment: Assignment | None) -> None:
        self._assignment = assignment
        self._changed.set()

    async def _wait_for_replica(self, make_task: Callable[[], Task]) -> tuple[Actor, Task]:
        """Follow the scheduler's assignments, prefetching at each, until one says to run."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            assignment = self._assignment
            if self.actor is not None and (assignment is None or assignment.replica != self.actor.id):
                self._leave_replica()
            if assignment is None:
                continue
            if self._task is None:
                self.actor = self._fleet.actor(assignment.replica)
                self._task = make_task()
            assert self.actor is not None
            if self._prefetch is None:  # even if it runs at once: a replica lost before `run` has computed nothing
                self._prefetch = asyncio.ensure_future(self._fleet.ask(self.actor, "prefetch", self._task))
                self._prefetch.add_done_callback(self._end_prefetch)
            if assignment.run or self._prefetch.done():
                await self._prefetch  # raises what failed it
            if assignment.run:
                return self.actor, self._task

    def _end_prefetch(self, prefetch: asyncio.Task[None]) -> None:
        if not prefetch.cancelled():
            prefetch.exception()  # or asyncio logs it, should the attempt have left the replica
            self._changed.set()

    def _leave_replica(self) -> None:
        """Abandon the task at its replica: it stops within a denoising step, and its slots are freed."""
        if self._prefetch is not None:
            self._prefetch.cancel()
        if self._task is not None:
            assert self.actor is not None
            self._fleet.send(self.actor, "release", self._task.key)
        self._task = self._prefetch = None


@dataclass(eq=False)
class Output:
    """Tensors or frames of a stage, and who holds them."""

    key: AttemptKey
    handoff: Handoff
    holder: Actor | None
    """None: the driver's pool."""
    reply: Reply | None = None
    """Of the replica that made it."""
    num_failed_pulls: int = 0


@dataclass(eq=False)
class StageRun:
    """One stage of one request."""

    name: str
    output: Output | None = None
    """What consumers pull: of a replica, or the copy."""
    copy: Output | None = None
    """Of finished latents, in the driver's pool."""
    copy_key: AttemptKey | None = None
    """Of the latest copy, under way or done."""
    blocks: dict[str, str] = field(default_factory=dict)
    """Digests of the blocks that made the output."""
    timing: StageTiming | None = None
    computing: asyncio.Task[None] | None = None
    """Runs the present attempt."""
    copying: asyncio.Task[None] | None = None
    """Copies the output into the driver's pool."""
    attempt: Attempt | None = None
    """The latest."""
    num_attempts: int = 0
    num_run: int = 0
    """Attempts that a replica was asked to compute."""
    num_failures: int = 0
    """Failed computations, each charged to the request."""
    failed_at: set[str] = field(default_factory=set)
    """Ids of replicas that failed to compute it, or twice to pull its inputs."""
    failed_pulls: Counter[str] = field(default_factory=Counter)
    """Failures to pull its inputs, by id of the replica."""

    @property
    def is_busy(self) -> bool:
        return self.computing is not None or self.copying is not None

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return [task for task in (self.computing, self.copying) if task is not None]
