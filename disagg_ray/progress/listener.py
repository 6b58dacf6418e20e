"""Calls a user's callback with events."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from disagg_ray.progress.events import Event

logger = logging.getLogger("disagg_ray")

QUEUED_EVENTS = 1000
CLOSE_S = 5.0
"""How long closing waits for a callback to return."""


class Listener:
    """Calls `on_event` on a thread of its own, so that it delays nothing; events that it is too slow for are dropped.

    What it raises is logged once, and stops nothing.
    """

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self._events: queue.Queue[Event | None] = queue.Queue(QUEUED_EVENTS)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="disagg_ray-listener", daemon=True)
        self._thread.start()

    def notify(self, event: Event) -> None:
        with suppress(queue.Full):
            self._events.put_nowait(event)

    def _run(self) -> None:
        failed = False
        while (event := self._events.get()) is not None:
            try:
                self._on_event(event)
            except Exception:
                if not failed:
                    logger.exception("the callback for progress events failed; requests continue")
                failed = True
            if self._closing and self._events.empty():
                return

    def close(self) -> None:
        """Deliver the events that came before and end the thread; a callback that hangs is left behind."""
        self._closing = True
        with suppress(queue.Full):  # then it is not waiting for an event
            self._events.put_nowait(None)
        if self._thread is not threading.current_thread():  # a callback closes the pipeline
            self._thread.join(CLOSE_S)
