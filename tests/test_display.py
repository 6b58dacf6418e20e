"""What a person sees: lines in a file, bars on a real pseudo-terminal."""

import fcntl
import io
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TextIO

import pytest
from rich.cells import cell_len
from rich.console import Console

from disagg_ray.progress.bars import MAX_ROWS, render
from disagg_ray.progress.board import Board, Totals
from disagg_ray.progress.display import Display, Mode
from disagg_ray.progress.events import Event
from disagg_ray.progress.wording import describe, summary

EVENT = Event("a1b2", "transformer", "transformer-0", 0, "running", 0, 50, 1000.0)
DEADLINE_S = 300
NEVER_S = 3600.0
"""Interval of a display whose thread draws nothing in a test."""


def wait_for(read: Callable[[], str], text: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while text not in read():
        assert time.monotonic() < deadline, read()
        time.sleep(0.01)


def draw_lines(events: list[Event], ended: dict[str, bool], total: int | None = 60) -> list[str]:
    """Return what would be written if one line were drawn after another until nothing is left."""
    stream = io.StringIO()
    with Display(total, "lines", stream, interval_s=NEVER_S) as shown:
        for event in events:
            shown.on_event(event)
        for request_id, ok in ended.items():
            shown.finished(request_id, ok)
        for _ in range(len(events) + len(ended) + 1):
            shown.draw()
        return stream.getvalue().splitlines()


def test_a_line_says_request_replica_step_and_time_left() -> None:
    events = [replace(EVENT, step=step, time=1000.0 + step) for step in range(13)]
    assert draw_lines(events, {}) == ["request a1b2: transformer-0 step 12/50, 38 s left"]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (replace(EVENT, state="waiting", replica=""), "waiting for transformer"),
        (replace(EVENT, state="pulling"), "transformer-0 pulling"),
        (replace(EVENT, state="failed", step=7), "transformer-0 failed"),
        (replace(EVENT, step=7, num_ranks=4), "transformer-0 (4 ranks) step 7/50"),
        (replace(EVENT, step=7, attempt=1), "transformer-0 step 7/50, attempt 2"),
        (replace(EVENT, stage="decoder", replica="decoder-1", steps=0), "decoder-1 running"),
    ],
)
def test_every_state_has_its_words(event: Event, text: str) -> None:
    assert draw_lines([event], {}) == [f"request a1b2: {text}"]


def test_requests_take_turns_and_those_that_wait_come_last() -> None:
    waiting = replace(EVENT, request_id="waits", state="waiting")
    events = [waiting, *(replace(EVENT, request_id=name, step=1) for name in ("b", "c", "b"))]
    names = [line.split()[1] for line in draw_lines(events, {})]
    assert names == ["b:", "c:", "waits:"]


def test_requests_that_end_together_share_a_line_that_names_a_failure() -> None:
    lines = draw_lines([EVENT], {"a1b2": True, "bad": False, "c": True})
    assert len(lines) == 1
    assert lines[0].startswith("request bad: failed and 2 more ended; 2 of 60 videos done, 1 failed")


def test_a_single_request_ends_without_totals() -> None:
    assert draw_lines([], {"a1b2": True}, total=1) == ["request a1b2: done"]


def test_lines_come_while_work_goes_on() -> None:
    stream = io.StringIO()
    with Display(None, "auto", stream, interval_s=0.01) as shown:
        shown.on_event(replace(EVENT, step=5))
        wait_for(stream.getvalue, "request a1b2: transformer-0 step 5/50\n")


def test_the_last_line_comes_when_work_ends() -> None:
    stream = io.StringIO()
    with Display(None, "auto", stream, interval_s=NEVER_S) as shown:
        shown.on_event(replace(EVENT, step=5))
        shown.draw()
        shown.finished("a1b2", ok=True)
    assert stream.getvalue().splitlines()[1].startswith("request a1b2: done; 1 videos done")


def test_what_a_user_wrote_cannot_reach_the_terminal_raw() -> None:
    hostile = "\x1b[2J[bold]\r\n\u202eevil\x07" + "x" * 300
    line = draw_lines([replace(EVENT, request_id=hostile, replica="transformer-0")], {})[0]
    assert line.isprintable()
    assert line.startswith("request \\x1b[2J[bold]\\r\\n\\u202eevil\\x07xxxxxxxx…: ")


def test_a_stream_that_knows_only_ascii_gets_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Display(1, "lines", stream) as shown:
        shown.finished("猫", ok=True)
    assert raw.getvalue() == b"request ?: done\n"


def test_quiet_writes_nothing_and_starts_nothing() -> None:
    stream, before = io.StringIO(), threading.enumerate()
    with Display(1, "quiet", stream) as shown:
        shown.on_event(EVENT)
        shown.finished("a1b2", ok=True)
        assert set(threading.enumerate()) <= set(before)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("mode", ["lines", "bars"])
def test_a_stream_that_is_closed_meanwhile_ends_the_display_and_nothing_else(mode: Mode) -> None:
    stream = io.StringIO()
    with Display(3, mode, stream) as shown:
        shown.on_event(EVENT)
        stream.close()
        shown.finished("a1b2", ok=True)
    assert "disagg_ray-display" not in {thread.name for thread in threading.enumerate()}


def test_many_threads_report_at_once() -> None:
    stream = io.StringIO()
    with Display(2000, "lines", stream) as shown, ThreadPoolExecutor(8) as threads:
        for index in range(2000):
            threads.submit(shown.on_event, replace(EVENT, request_id=str(index)))
            threads.submit(shown.finished, str(index), ok=True)
        threads.shutdown()
        assert shown.board.totals().done == 2000
        assert shown.board.requests == {}


def draw_bars(num_requests: int, size: tuple[int, int], total: int | None = 60, **change: object) -> list[str]:
    """Return the bars' lines for requests at step 12 of 50, on a terminal of `size` columns and lines."""
    board, stream = Board(total), io.StringIO()
    for index in range(num_requests):
        event = replace(EVENT, request_id=f"request-{index}", replica=f"transformer-{index}", **change)  # type: ignore[arg-type]
        for step in (0, 12):
            board.on_event(replace(event, step=step, time=1000.0 + step))
    Console(file=stream, width=size[0], height=size[1]).print(render(board, *size))
    return stream.getvalue().splitlines()


def test_each_request_that_runs_has_a_row() -> None:
    for number in (1, 3):
        *rows, overall = draw_bars(number, (80, 24))
        assert len(rows) == number
        assert overall.startswith("0 of 60 videos done")
        assert all(row.split()[:2] == [f"request-{n}", f"transformer-{n}"] for n, row in enumerate(rows))
        assert all(row.rstrip().endswith("12/50 38 s left") for row in rows)


def test_a_row_says_how_many_ranks_a_replica_has() -> None:
    assert "transformer-0 (4 ranks)" in draw_bars(1, (80, 24), num_ranks=4)[0]


def test_rows_beyond_the_cap_are_counted() -> None:
    lines = draw_bars(60, (80, 24))
    assert len(lines) == MAX_ROWS + 2
    assert lines[-2].strip() == "and 44 more"


def test_a_single_request_has_no_overall_line() -> None:
    assert len(draw_bars(1, (80, 24), total=1)) == 1


def test_waiting_requests_are_counted_by_stage() -> None:
    assert draw_bars(7, (80, 24), state="waiting")[-1].strip() == "waiting: transformer 7"


@pytest.mark.parametrize("size", [(200, 50), (80, 24), (62, 12), (44, 8), (20, 4)])
def test_bars_fit_the_terminal(size: tuple[int, int]) -> None:
    lines = draw_bars(60, size)
    assert max(cell_len(line) for line in lines) <= size[0]
    assert len(lines) < size[1]


@pytest.mark.parametrize("columns", [80, 50])
def test_the_numbers_outlive_a_narrow_terminal(columns: int) -> None:
    assert all("12/50 38 s left" in row for row in draw_bars(3, (columns, 24))[:3])


class Terminal:
    """A pseudo-terminal of 80 columns and 24 lines that keeps what is written to it."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.stream: TextIO = os.fdopen(theirs, "w", encoding="utf-8")
        self._output = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self._output += os.read(self._ours, 4096)
            except OSError:  # the last writer has closed it
                return

    def wait_for(self, text: str) -> None:
        wait_for(lambda: self._output.decode(errors="ignore"), text)

    def close(self) -> str:
        """Return all that was written."""
        self.stream.close()
        self._reader.join(DEADLINE_S)
        os.close(self._ours)
        return self._output.decode()


@contextmanager
def logging_to(stream: TextIO) -> Iterator[logging.StreamHandler[TextIO]]:
    handler = logging.StreamHandler(stream)
    logging.getLogger("disagg_ray").addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger("disagg_ray").removeHandler(handler)


def test_a_terminal_gets_bars_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    with Display(2, "auto", terminal.stream, interval_s=0.01) as shown:
        shown.on_event(EVENT)
        terminal.wait_for("transformer-0")
        shown.finished("a1b2", ok=True)
    output = terminal.close()
    assert output.index("\x1b[?25l") < output.index("transformer-0") < output.index("\x1b[?25h")
    assert "1 of 2 videos done" in output.rstrip().splitlines()[-1]


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with Display(1, "auto", terminal.stream) as shown:
        shown.finished("a1b2", ok=True)
    assert terminal.close() == "request a1b2: done\r\n"


def test_log_lines_stay_whole_above_the_bars() -> None:
    terminal = Terminal()
    with logging_to(terminal.stream) as handler:
        with Display(2, "bars", terminal.stream) as shown:
            shown.on_event(EVENT)
            logging.getLogger("disagg_ray").warning("[bold]a warning[/] of request %s", "a1b2")
        assert handler.stream is terminal.stream
    assert "[bold]a warning[/] of request a1b2\r\n" in terminal.close()


PROGRAM = """
import logging, sys
from disagg_ray.progress.display import Display
from disagg_ray.progress.events import Event
logging.basicConfig(stream=sys.stderr, format="%(message)s")
with Display(1) as display:
    display.on_event(Event("a1b2", "transformer", "transformer-0", 0, "running", 1, 50))
    print("wrote a.mp4")
    logging.warning("careful")
"""


def test_output_that_goes_to_a_file_stays_there_while_bars_run() -> None:
    terminal = Terminal()
    environment = os.environ | {"TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE, stderr=terminal.stream, env=environment, timeout=DEADLINE_S, check=True,
    )  # fmt: skip
    assert done.stdout == b"wrote a.mp4\n"
    output = terminal.close()
    assert "transformer-0" in output
    assert "careful\r\n" in output


def test_the_rate_is_a_number_that_says_something() -> None:
    totals = Totals(3, 1, 60, 2, {}, 4.234, 700.0)
    assert summary(totals) == "3 of 60 videos done, 1 failed, 4.2 a minute, 12 min left"
    assert summary(replace(totals, makes="image")).startswith("3 of 60 images done")
    assert summary(replace(totals, videos_per_min=0.05)).split(", ")[2] == "3.0 an hour"


def test_describe_counts_the_time_left_down() -> None:
    board = Board(1)
    board.on_event(EVENT)
    track = board.on_event(replace(EVENT, step=10, time=1010.0))
    assert track is not None
    assert describe(track, track.seen + 5) == "transformer-0 step 10/50, 35 s left"
    assert summary(board.totals()) == "0 of 1 videos done"
