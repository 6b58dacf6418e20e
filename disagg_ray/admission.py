"""Who may start: a bounded queue before a gate that lets so many requests in at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from disagg_ray.errors import Cancelled, DisaggError, Overloaded
from disagg_ray.queues import FairQueue
from disagg_ray.signals import until


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
    """A request takes a place in the queue from any thread, then enters through the gate on the event loop.

    `max_queued` requests may wait; `room` may be inside.
    """

    def __init__(self, max_queued: int, room: int) -> None:
        self._max_queued, self._size, self._room = max_queued, room, room
        self._changed = threading.Condition()
        self._queued: set[object] = set()
        self._closed: DisaggError | None = None
        self._waiting: FairQueue[_Turn] = FairQueue()

    @contextmanager
    def queue(self, ticket: object, *, wait: bool) -> Iterator[None]:
        """Take a place in the queue; wait until there is one, or raise. What is done inside comes before `close`.

        Raises:
            Overloaded: there is none, and `wait` is False.
            DisaggError: what admission was closed with.
        """
        with self._changed:
            full = len(self._queued) >= self._max_queued
            if full and not wait and self._closed is None:
                raise Overloaded(f"limits.max_queued: {self._max_queued} requests wait already; try later, or wait")
            until(self._changed, lambda: self._closed is not None or len(self._queued) < self._max_queued)
            if self._closed is not None:
                raise self._closed
            self._queued.add(ticket)
            yield

    def leave_queue(self, ticket: object) -> None:
        """Give a place in the queue back. Idempotent."""
        with self._changed:
            self._queued.discard(ticket)
            self._changed.notify()

    def close(self, reason: DisaggError | None = None) -> None:
        """Let nobody into the queue any more; whoever tries or waits gets the reason; the first counts."""
        with self._changed:
            self._closed = self._closed or reason or Cancelled("the pipeline is closed")
            self._changed.notify_all()

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
