"""Clocks of what a replica's threads do."""

from __future__ import annotations

import math
import time

from disagg_ray.replica.activity import Activities


def test_only_what_is_being_done_can_stall_and_by_its_name() -> None:
    activities, began = Activities(), time.monotonic()
    assert activities.stalled() == {}
    with activities.working("compute"), activities.working("encode"):
        stalled = activities.stalled()
        assert stalled.keys() == {"compute", "encode"}
        assert all(0 <= seconds <= time.monotonic() - began for seconds in stalled.values())
    assert activities.stalled() == {}


def test_of_two_that_do_the_same_the_longest_counts() -> None:
    now = [1000.0]
    activities = Activities(clock=lambda: now[0])
    with activities.working("piece"):
        now[0] += 100
        with activities.working("piece"):
            assert activities.stalled()["piece"] >= 100


def test_progress_starts_the_clock_anew() -> None:
    now = [1000.0]
    activities = Activities(clock=lambda: now[0])
    with activities.working("compute") as activity:
        now[0] += 100
        activity.progress()
        assert activities.stalled()["compute"] < 100


def test_what_is_excused_stalls_only_from_then_on() -> None:
    now, until = [1000.0], math.inf
    activities = Activities(clock=lambda: now[0])
    with activities.working("pull", lambda: min(until, now[0])):
        now[0] += 100
        assert activities.stalled() == {"pull": 0.0}
        until = -math.inf
        assert 0 <= activities.stalled()["pull"] < 100, "it was excused until a moment ago"
