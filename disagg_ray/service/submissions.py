"""What the supervisor knows of its clients: the requests they submitted, and the events they have not fetched."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from dataclasses import dataclass

from disagg_ray.driver.handle import Handle
from disagg_ray.errors import Overloaded, RequestInFlight
from disagg_ray.models.identity import identify_request
from disagg_ray.progress.events import Event
from disagg_ray.request import ResolvedRequest
from disagg_ray.service.protocol import SubmitMessage

logger = logging.getLogger("disagg_ray")

MAX_EVENTS = 1_000
"""Of a client that does not fetch them; older ones are dropped."""
MAX_CANCELLED = 1_000
"""Tickets that are remembered; no client has more calls under way."""


@dataclass(eq=False)
class Entry:
    """A request that was submitted, until its client has the answer."""

    message: SubmitMessage
    handle: Handle
    setup: str
    """Of the pipeline when it was submitted (`identity.identify_setup`)."""
    tickets: set[str]
    """Of all submissions of this video: no other gets it under their request's id."""

    def serves(self, message: SubmitMessage, setup: str) -> bool:
        """Return whether it makes the same video, and neither failed nor was cancelled."""
        future = self.handle.future
        lost = future.done() and (future.cancelled() or future.exception() is not None)
        return not lost and setup == self.setup and _video(self.message.request) == _video(message.request)

    def replace_by(self, message: SubmitMessage) -> None:
        """Cancel it in favour of another request of its id.

        Raises:
            RequestInFlight: another connection waits for it.
        """
        name = message.request.id
        if not self.handle.done() and self.message.client != message.client:
            raise RequestInFlight(
                f"id: {name!r} is in flight under this run id, from another client with another prompt, image or "
                f"other field, or before the configuration changed; wait for it, or give another id"
            )
        logger.info("request %s: submitted again with other inputs, or after it failed; it is computed again", name)
        self.handle.cancel()


def _video(request: ResolvedRequest) -> tuple[str, int, str]:
    """Return what distinguishes a request's video from others of one setup."""
    return identify_request(request), request.fps, request.format


class ClientState:
    """Everything submitted under one run id."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.tag = hashlib.sha256(run_id.encode()).hexdigest()[:8]
        """Distinguishes its requests from others' of the same id."""
        self.entries: dict[str, Entry] = {}
        """By request id, until the client reports that it has the answer."""
        self.cancelled: deque[str] = deque(maxlen=MAX_CANCELLED)
        """Tickets that the client was done with before they arrived."""
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.has_events = asyncio.Event()
        self.has_finished = asyncio.Event()
        """Some entry is finished."""
        self.heartbeats: dict[str, int] = {}
        """How many came from each connection that has not left."""

    @property
    def num_unfinished(self) -> int:
        return sum(not entry.handle.done() for entry in self.entries.values())

    def leave(self, connection: str) -> None:
        """Cancel and forget what a connection submitted last."""
        self.heartbeats.pop(connection, None)
        for request_id, entry in list(self.entries.items()):
            if entry.message.client == connection:
                del self.entries[request_id]
                entry.handle.cancel()
        self.has_finished.set()

    async def wait_for_room(self, message: SubmitMessage, limit: int, *, wait: bool) -> None:
        """Wait until it has fewer than `limit` unfinished requests, or this one.

        Raises:
            Overloaded: it would have to wait, and `wait` is False.
        """
        while message.request.id not in self.entries and self.num_unfinished >= limit:
            if not wait:
                raise Overloaded(f"limits.max_queued: this client has {limit} unfinished requests; try later")
            self.has_finished.clear()
            await self.has_finished.wait()
