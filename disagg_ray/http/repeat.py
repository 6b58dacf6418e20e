"""What a service does again and again on a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event

logger = logging.getLogger("disagg_ray")

FAULT_S = 1.0
"""Between an error and the next call."""


def repeat(what: str, call: Callable[[], None], every_s: Callable[[], float], closing: Event) -> None:
    """Call every `every_s()` seconds until `closing` is set; log an error and continue with the next call."""
    while not closing.wait(every_s()):
        try:
            call()
        except Exception:  # the thread must outlive it: nothing else does its work
            logger.exception("%s", what)
            closing.wait(FAULT_S)
