"""Deadlines, expiry and ages while the wall clock is set."""

from __future__ import annotations

import time

import pytest

from disagg_ray.http.clock import steady_now


@pytest.mark.parametrize("by_s", [-86400.0, 86400.0])
def test_a_wall_clock_that_is_set_moves_no_deadline(by_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    before, wall = steady_now(), time.time()
    monkeypatch.setattr(time, "time", lambda: wall + by_s)
    assert 0 <= steady_now() - before < 3600
