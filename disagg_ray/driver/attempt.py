"""One attempt's way to the replica that computes it: to wherever the scheduler says, prefetching where it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from disagg_ray.driver.calls import Actor
from disagg_ray.driver.fleet import Fleet
from disagg_ray.replica.messages import Task
from disagg_ray.scheduling.scheduler import Assignment


class Turn:
    """Where the scheduler wants a job to be, as something to wait for."""

    def __init__(self) -> None:
        self._place: Assignment | None = None
        self._moved = asyncio.Event()
        self.actor: Actor | None = None
        """The replica that it came to last."""

    def move(self, place: Assignment | None) -> None:
        self._place = place
        self._moved.set()

    async def next(self) -> Assignment | None:
        """Wait until the place has changed; None: the job waits in the queue again."""
        await self._moved.wait()
        self._moved.clear()
        return self._place


@dataclass(eq=False)
class Visit:
    """A task at a replica."""

    actor: Actor
    task: Task
    fetch: asyncio.Task[None] | None = None
    """Of its inputs, ahead of its turn."""

    def leave(self, fleet: Fleet) -> None:
        """Give the task up there: it stops within a denoising step, and its slots are freed, now or when it ends."""
        if self.fetch is not None:
            self.fetch.cancel()
        fleet.send(self.actor, "release", self.task.key)


async def follow(turn: Turn, fleet: Fleet, new_task: Callable[[], Task]) -> Visit:
    """Go where the scheduler says until that is a replica that computes the task now.

    Raises:
        DisaggError: what failed a prefetch.
    """
    visit: Visit | None = None
    try:
        while True:
            place = await _next_place(turn, visit)
            if visit is not None and (place is None or place.replica != visit.actor.id):
                visit.leave(fleet)
                visit = None
            if place is None:
                continue
            if visit is None:
                turn.actor = fleet.actor(place.replica)
                visit = Visit(turn.actor, new_task())
            if visit.fetch is None:  # also where it computes at once: what dies before `run` has computed nothing
                fetching = fleet.ask(visit.actor, "prefetch", visit.task)
                visit.fetch = asyncio.ensure_future(fetching)
                visit.fetch.add_done_callback(lambda fetch: fetch.cancelled() or fetch.exception())  # if only here
            if place.run:
                await visit.fetch
                return visit
    except BaseException:
        if visit is not None:
            visit.leave(fleet)
        raise


async def _next_place(turn: Turn, visit: Visit | None) -> Assignment | None:
    """Wait for the scheduler's word, or for a prefetch to fail."""
    moved = asyncio.ensure_future(turn.next())
    try:
        if visit is not None and visit.fetch is not None:
            await asyncio.wait({moved, visit.fetch}, return_when=asyncio.FIRST_COMPLETED)
            if visit.fetch.done() and not moved.done():
                visit.fetch.result()
        return await moved
    finally:
        moved.cancel()
