"""What a service does again and again on a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event

logger = logging.getLogger("disagg_ray")

FAULT_S = 1.0
"""Between an error and the next call."""


def repeat(what: str, call: Callable[[], None], every_s: Callable[[], float], closing: Event) -> None:
    """Call after every so many seconds until it closes; an error is reported, and the next call made all the same."""
    while not closing.wait(every_s()):
        try:
            call()
        except Exception:  # the thread must outlive it: nothing else does its work
            logger.exception("%s", what)
            closing.wait(FAULT_S)
