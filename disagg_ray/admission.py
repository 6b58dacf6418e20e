"""Who may start: a bounded queue before a gate that lets so many requests in at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from disagg_ray.errors import Cancelled, DisaggError, Overloaded
from disagg_ray.queues import PriorityQueue


class Admission:
    """A request takes a place in the queue from any thread, then enters through the gate on the event loop.

    `max_queued` requests may wait; `room` may be inside.
    """

    def __init__(self, max_queued: int, room: int) -> None:
        self._max_queued, self._room = max_queued, room
        self._changed = threading.Condition()
        self._queued: set[object] = set()
        self._closed: DisaggError | None = None
        self._waiting: PriorityQueue[asyncio.Future[None]] = PriorityQueue()

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
            self._changed.wait_for(lambda: self._closed is not None or len(self._queued) < self._max_queued)
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

    async def enter(self, priority: int, sequence: int) -> None:
        """Wait for one's turn at the gate: higher priority first, and in order."""
        if self._room:
            self._room -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.push(turn, priority, sequence)
        try:
            await turn
        except asyncio.CancelledError:
            if not self._waiting.remove(turn) and not turn.cancelled():
                self.leave()  # it was let in at the same moment
            raise

    def leave(self) -> None:
        """Make room for the next."""
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._room += 1
