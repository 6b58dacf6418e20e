"""Who may start: a bounded queue before a gate that lets so many requests in at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from disagg_ray.errors import Cancelled, DisaggError, Overloaded
from disagg_ray.scheduling.queues import FairQueue


@dataclass(frozen=True)
class Pass:
    """What whoever is inside holds, and gives back when it leaves."""

    driver: str
    seconds: float
    """Predicted."""


@dataclass(eq=False)
class _Turn:
    future: asyncio.Future[Pass]
    driver: str
    seconds: Callable[[], float]


class Admission:
    """A request takes a place in the queue, then enters through the gate; all on the event loop.

    `max_queued` requests may wait; `room` may be inside.
    """

    def __init__(self, max_queued: int, room: int) -> None:
        self._max_queued, self._size, self._room = max_queued, room, room
        self._changed = asyncio.Event()
        """Something about the queue is."""
        self._queued: set[object] = set()
        self._closed: DisaggError | None = None
        self._waiting: FairQueue[_Turn] = FairQueue()

    async def queue(self, ticket: object, *, wait: bool) -> None:
        """Take a place in the queue; wait until there is one, or raise.

        Raises:
            Overloaded: there is none, and `wait` is False.
            DisaggError: what admission was closed with.
        """
        while self._closed is None and len(self._queued) >= self._max_queued:
            if not wait:
                raise Overloaded(f"limits.max_queued: {self._max_queued} requests wait already; try later, or wait")
            self._changed.clear()
            await self._changed.wait()
        if self._closed is not None:
            raise self._closed
        self._queued.add(ticket)

    def leave_queue(self, ticket: object) -> None:
        """Give a place in the queue back. Idempotent."""
        self._queued.discard(ticket)
        self._changed.set()

    def close(self, reason: DisaggError | None = None) -> None:
        """Let nobody into the queue any more; whoever tries or waits gets the reason; the first counts."""
        self._closed = self._closed or reason or Cancelled("the pipeline is closed")
        self._changed.set()

    def reopen(self, reason: DisaggError) -> None:
        """Let requests in again if it was closed for this reason."""
        if self._closed is reason:
            self._closed = None

    async def enter(
        self, priority: int, sequence: int, driver: str = "", seconds: Callable[[], float] = lambda: 0.0
    ) -> Pass:
        """Wait for one's turn at the gate: the driver with the least inside first, as `FairQueue` says.

        Within a driver higher priority goes first, and in order. `seconds` is asked what the request is predicted to
        take when it enters.
        """
        turn = _Turn(asyncio.get_running_loop().create_future(), driver, seconds)
        self._waiting.push(turn, driver, priority, sequence)
        self._let_in()
        try:
            return await turn.future
        except asyncio.CancelledError:
            if not self._waiting.remove(turn) and not turn.future.cancelled():
                self.leave(turn.future.result())  # it was let in at the same moment
            raise

    def leave(self, given: Pass) -> None:
        """Make room for the next."""
        self._waiting.credit(given.driver, given.seconds)
        self._room += 1
        self._let_in()

    def resize(self, room: int) -> None:
        """Let so many be inside from now on; those inside stay."""
        self._room += room - self._size
        self._size = room
        self._let_in()

    def _let_in(self) -> None:
        while self._room > 0 and self._waiting:
            turn = self._waiting.pop()
            if turn.future.cancelled():  # it has not heard yet
                continue
            given = Pass(turn.driver, turn.seconds())
            self._waiting.charge(given.driver, given.seconds)
            self._room -= 1
            turn.future.set_result(given)
