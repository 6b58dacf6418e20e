"""Who may start: a bounded queue before a gate that lets a limited number of requests in at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from disagg_ray.errors import Cancelled, DisaggError, Overloaded
from disagg_ray.scheduling.queues import FairQueue


@dataclass(eq=False)
class Ticket:
    """A request at the gate or inside."""

    client: str
    predict: Callable[[], float]
    """Returns the seconds that it will take."""
    admitted: asyncio.Future[None]
    seconds: float = 0.0
    """Predicted when it was admitted."""


class Admission:
    """A request takes a place in the queue, then enters through the gate; all on the event loop.

    At most `max_queued` requests wait, and at most `capacity` are inside.
    """

    def __init__(self, max_queued: int, capacity: int) -> None:
        self._max_queued, self._capacity = max_queued, capacity
        self._num_inside = 0
        self._queued: set[object] = set()
        self._queue_changed = asyncio.Event()
        self._closed: DisaggError | None = None
        self._waiting: FairQueue[Ticket] = FairQueue()

    async def queue(self, request: object, *, wait: bool) -> None:
        """Take a place in the queue; wait until one is free, or raise.

        Raises:
            Overloaded: none is free, and `wait` is False.
            DisaggError: what admission was closed with.
        """
        while self._closed is None and len(self._queued) >= self._max_queued:
            if not wait:
                raise Overloaded(f"limits.max_queued: {self._max_queued} requests wait already; try later, or wait")
            self._queue_changed.clear()
            await self._queue_changed.wait()
        if self._closed is not None:
            raise self._closed
        self._queued.add(request)

    def leave_queue(self, request: object) -> None:
        """Give a place in the queue back. Idempotent."""
        self._queued.discard(request)
        self._queue_changed.set()

    def close(self, reason: DisaggError | None = None) -> None:
        """Let no request into the queue any more: `queue` raises the first reason given."""
        self._closed = self._closed or reason or Cancelled("the pipeline is closed")
        self._queue_changed.set()

    def reopen(self, reason: DisaggError) -> None:
        """Let requests in again if it was closed for this reason."""
        if self._closed is reason:
            self._closed = None

    async def enter(
        self, priority: int, sequence: int, client: str = "", predict: Callable[[], float] = lambda: 0.0
    ) -> Ticket:
        """Wait at the gate: the next is of the client with the least inside (`FairQueue`), by priority and sequence.

        `predict` is called when the request enters.
        """
        ticket = Ticket(client, predict, asyncio.get_running_loop().create_future())
        self._waiting.push(ticket, client, priority, sequence)
        self._admit()
        try:
            await ticket.admitted
        except asyncio.CancelledError:
            if not self._waiting.remove(ticket) and not ticket.admitted.cancelled():
                self.leave(ticket)  # it was admitted at the same moment
            raise
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Make room for the next."""
        self._waiting.credit(ticket.client, ticket.seconds)
        self._num_inside -= 1
        self._admit()

    def resize(self, capacity: int) -> None:
        """Change how many may be inside; those inside stay."""
        self._capacity = capacity
        self._admit()

    def _admit(self) -> None:
        while self._num_inside < self._capacity and self._waiting:
            ticket = self._waiting.pop()
            if ticket.admitted.cancelled():  # its task has not run since
                continue
            ticket.seconds = ticket.predict()
            self._waiting.charge(ticket.client, ticket.seconds)
            self._num_inside += 1
            ticket.admitted.set_result(None)
