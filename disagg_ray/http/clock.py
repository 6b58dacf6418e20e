"""The clock of deadlines and expiry."""

from __future__ import annotations

import time

OFFSET_S = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
"""Taken once: when the wall clock moves, a process cannot tell whether it was put right or wrong. To follow it, what is
stored would have to move too, and a row does not say which process, with which offset, wrote its times."""


def steady_now() -> float:
    """Return seconds since the epoch as this process saw them first, going on whatever becomes of the wall clock.

    A wall clock that is set forward would end jobs and remove files early; one set back, late. Time that the machine
    sleeps counts.
    """
    return OFFSET_S + time.clock_gettime(time.CLOCK_BOOTTIME)
