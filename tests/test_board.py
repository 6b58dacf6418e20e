"""Where requests stand, learned from events."""

from dataclasses import replace

import pytest

from disagg_ray.progress.board import REMEMBERED, Board, Track
from disagg_ray.progress.events import Event

EVENT = Event("a1b2", "transformer", "transformer-0", 0, "running", 0, 50, 1000.0)


def step(board: Board, done: int, seconds: float, **other: object) -> Track | None:
    return board.on_event(replace(EVENT, step=done, time=1000 + seconds, **other))  # type: ignore[arg-type]


def test_time_left_is_learned_from_the_steps_so_far_by_the_clock_of_the_replica() -> None:
    board = Board(1)
    first = step(board, 0, 0.0)
    assert first is not None
    assert first.seconds_left(first.seen) is None
    step(board, 10, 20.0)
    assert first.seconds_left(first.seen) == pytest.approx(80)
    assert first.seconds_left(first.seen + 30) == pytest.approx(50)
    assert first.seconds_left(first.seen + 500) == 0


def test_a_slow_first_step_is_forgotten() -> None:
    board = Board(1)
    step(board, 0, 0)
    for done in range(1, 40):
        track = step(board, done, 600.0 + done)
    assert track is not None
    assert track.seconds_left(track.seen) == pytest.approx(11)


def test_a_new_attempt_starts_over_and_the_old_one_is_not_heard_any_more() -> None:
    board = Board(1)
    step(board, 0, 0)
    step(board, 30, 30)
    track = step(board, 1, 40, attempt=1, replica="transformer-1")
    assert track is not None
    assert track.seconds_left(track.seen) is None
    assert step(board, 31, 41) is None
    assert [track.event.replica for track in board.active()] == ["transformer-1"]


def test_a_late_event_of_one_stage_does_not_hide_the_next() -> None:
    board = Board(1)
    board.on_event(replace(EVENT, stage="encoder", replica="encoder-0"))
    board.on_event(replace(EVENT, state="waiting", replica=""))
    board.on_event(replace(EVENT, stage="encoder", replica="encoder-0", state="done"))
    assert board.totals().waiting == {"transformer": 1}
    assert board.active() == []


def test_events_of_a_finished_request_come_too_late() -> None:
    board = Board(2)
    step(board, 1, 1)
    board.finished("a1b2", ok=True)
    assert step(board, 2, 2) is None
    assert (board.requests, board.totals().running, board.totals().done) == ({}, 0, 1)


def test_totals_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("disagg_ray.progress.board.time.monotonic", lambda: now[0])
    board = Board(10)
    board.on_event(EVENT)
    assert (board.totals().videos_per_min, board.totals().seconds_left) == (None, None)
    for name in ("a", "b", "c", "d"):
        now[0] += 30
        board.finished(name, ok=name != "c")
    now[0] += 10
    totals = board.totals()
    assert (totals.done, totals.failed, totals.total, totals.running) == (3, 1, 10, 1)
    assert totals.videos_per_min == pytest.approx(2)
    assert totals.seconds_left == pytest.approx(6 * 30 - 10)


def test_what_is_remembered_of_finished_requests_is_bounded() -> None:
    board = Board(None)
    for index in range(REMEMBERED + 5):
        board.on_event(replace(EVENT, request_id=str(index)))
        board.finished(str(index), ok=True)
    assert board.totals().done == REMEMBERED + 5
    assert board.requests == {}
    late = (board.on_event(replace(EVENT, request_id=str(index))) for index in range(REMEMBERED + 5))
    assert [track is None for track in late] == [False] * 5 + [True] * REMEMBERED
