"""Displays progress: live bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Literal, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from disagg_ray.progress.board import Board, Totals, Track
from disagg_ray.progress.events import Event
from disagg_ray.text import human_seconds, printable

Mode = Literal["auto", "bars", "lines", "quiet"]

BARS_INTERVAL_S = 0.5
LINE_INTERVAL_S = 1.0
MAX_ROWS = 16
MAX_ID_CHARS = 40
NARROW_CHARS = 64
"""Terminals below this width show no bars beside the numbers."""


class View(Protocol):
    """Displays a board."""

    def draw(self) -> None:
        """Display what changed."""

    def close(self) -> None:
        """Display the last changes, and restore the terminal."""


class Display:
    """Shows progress while it is entered. Any thread may report to it, at the price of a dictionary update.

    `total` is the number of requests, None if that is not known beforehand; `mode` auto means bars on a terminal and
    lines elsewhere; `stream` is standard error by default, so that what a command prints stays clean; `interval_s` is
    the time between two updates, by default `BARS_INTERVAL_S` or `LINE_INTERVAL_S`; `makes`
    says what comes of a request: video or image.
    """

    def __init__(
        self, total: int | None, mode: Mode = "auto", stream: TextIO | None = None, interval_s: float | None = None,
        makes: str = "video",
    ) -> None:  # fmt: skip
        self._stream = stream or sys.stderr
        self._mode = mode if mode != "auto" else _fitting(self._stream)
        self._interval_s = interval_s or (BARS_INTERVAL_S if self._mode == "bars" else LINE_INTERVAL_S)
        self.board = Board(total, makes)
        """What is displayed."""
        self._changed: dict[str, Track] = {}
        self._ended: list[tuple[str, bool]] = []
        self._closing = threading.Event()

    def __enter__(self) -> Display:
        if self._mode != "quiet":
            self._view: View
            if self._mode == "bars":
                self._view = _Bars(self.board, self._stream)
            else:
                self._view = _Lines(self.board, self._changed, self._ended, self._stream)
            self._thread = threading.Thread(target=self._run, name="disagg_ray-display", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mode != "quiet":
            self._closing.set()
            self._thread.join()
            with suppress(OSError, ValueError):
                self._view.close()

    def on_event(self, event: Event) -> None:
        """Record an event."""
        if self._mode == "quiet":
            return
        if not event.stage:
            self.finished(event.request_id, event.state == "done")
            return
        with self.board.lock:
            track = self.board.on_event(event)
            if track is not None and self._mode == "lines":
                self._changed[event.request_id] = track

    def finished(self, request_id: str, ok: bool) -> None:
        """Record the end of a request; ignore its later events."""
        if self._mode == "quiet":
            return
        with self.board.lock:
            self.board.finished(request_id, ok)
            if self._mode == "lines":
                self._changed.pop(request_id, None)
                self._ended.append((request_id, ok))

    def draw(self) -> None:
        """Display what changed: in lines, the next line. Between entering and leaving, a thread calls this."""
        if self._mode != "quiet":
            self._view.draw()

    def _run(self) -> None:
        with suppress(OSError, ValueError):  # the stream is closed
            while not self._closing.wait(self._interval_s):
                self.draw()


def _fitting(stream: TextIO) -> Literal["bars", "lines"]:
    """Return the view for a stream."""
    terminal = stream.isatty() and not Console(file=stream, force_terminal=True).is_dumb_terminal
    return "bars" if terminal else "lines"


class _Lines:
    """Log lines: at most one at each draw, and only when something changed."""

    def __init__(self, board: Board, changed: dict[str, Track], ended: list[tuple[str, bool]], stream: TextIO) -> None:
        self._board, self._changed, self._ended, self._stream = board, changed, ended, stream

    def draw(self) -> None:
        with self._board.lock:
            line = self._next()
        if line is not None:
            encoding = self._stream.encoding or "utf-8"
            self._stream.write(f"{line}\n".encode(encoding, "replace").decode(encoding))  # at once: others write too
            self._stream.flush()

    def _next(self) -> str | None:
        """Return the next line: the requests that ended, else the one whose change has waited longest.

        One that waits for a replica comes last.
        """
        request_id: str | None
        if self._ended:
            request_id, ok = min(self._ended, key=lambda ended: ended[1])  # one that failed, if any did
            others = len(self._ended) - 1
            self._ended.clear()
            more = f" and {others} more ended" if others else ""
            totals = self._board.totals()
            overall = f"; {summary(totals)}" if totals.total != 1 else ""
            return f"request {printable(request_id, MAX_ID_CHARS)}: {'done' if ok else 'failed'}{more}{overall}"
        working = (key for key, track in self._changed.items() if track.event.state != "waiting")
        request_id = next(working, next(iter(self._changed), None))
        if request_id is not None:
            track = self._changed.pop(request_id)
            return f"request {printable(request_id, MAX_ID_CHARS)}: {describe(track, time.monotonic())}"
        return None

    def close(self) -> None:
        if self._ended:
            self.draw()


class _Bars:
    """Live bars, as `render` makes them; log lines go above them."""

    def __init__(self, board: Board, stream: TextIO) -> None:
        self._board, self._stream = board, stream
        self._console = Console(file=stream, force_terminal=True, markup=False, highlight=False, emoji=False)
        self._handlers = list(_handlers(stream))
        self._live = Live(
            console=self._console, get_renderable=lambda: render(board, *self._console.size),
            auto_refresh=False, transient=True,
            redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty(),
        )  # fmt: skip
        self._live.start()
        for handler in self._handlers:  # log lines go above the bars
            handler.setStream(FileProxy(self._console, stream))  # type: ignore[arg-type]

    def draw(self) -> None:
        self._live.refresh()

    def close(self) -> None:
        try:
            self._live.stop()
        finally:
            for handler in self._handlers:
                handler.setStream(self._stream)
        with self._board.lock:
            totals = self._board.totals()
        if totals.total != 1 and totals.done + totals.failed:
            self._console.print(summary(totals))


def render(board: Board, columns: int, lines: int) -> RenderableType:
    """Return the bars for a terminal of this size: a row for each request that is computed, the total below."""
    wide = columns >= NARROW_CHARS
    with board.lock:
        active, totals = board.active(), board.totals()
        rows = active[: max(min(MAX_ROWS, lines - 5), 1)]
        table = _table(rows, time.monotonic(), wide=wide)
    parts: list[RenderableType] = [table] if rows else []
    if len(active) > len(rows):
        parts.append(_line(f"and {len(active) - len(rows)} more"))
    if totals.total != 1:
        parts.append(_overall(totals, wide=wide))
    if totals.waiting:
        parts.append(_line("waiting: " + ", ".join(f"{stage} {n}" for stage, n in totals.waiting.items())))
    return Group(*parts)


def _table(rows: list[Track], now: float, *, wide: bool) -> Table:
    table = Table.grid(padding=(0, 1), expand=wide)
    table.add_column(max_width=20)  # the one that gives way where the terminal is narrow
    table.add_column(no_wrap=True)
    if wide:
        table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    for track in rows:
        event = track.event
        bar = [ProgressBar(event.steps, event.step) if event.steps else ""] if wide else []
        progress = f"{event.step}/{event.steps}" if event.steps else event.state
        table.add_row(
            _line(printable(event.request_id, MAX_ID_CHARS)), _line(_replica(event)), *bar, progress, _clock(track, now)
        )
    return table


def _overall(totals: Totals, *, wide: bool) -> RenderableType:
    line = _line(summary(totals))
    if not wide or not totals.total:
        return line
    table = Table.grid(padding=(0, 1))
    table.add_row(line, ProgressBar(totals.total, totals.done + totals.failed, width=20))
    return table


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _clock(track: Track, now: float) -> str:
    """Return the time left, or the time passed if that is not known."""
    left = track.seconds_left(now)
    return f"{human_seconds(now - track.since)} so far" if left is None else f"{human_seconds(left)} left"


def describe(track: Track, now: float) -> str:
    """Return the progress of a request, as `transformer-0 step 12/50, 38 s left`."""
    event = track.event
    if event.state == "waiting":
        return f"waiting for {event.stage}{_attempt(event)}"
    if event.state != "running" or not event.step:
        return f"{_replica(event)} {event.state}{_attempt(event)}"
    left = track.seconds_left(now)
    time_left = "" if left is None else f", {human_seconds(left)} left"
    return f"{_replica(event)} step {event.step}/{event.steps}{time_left}{_attempt(event)}"


def _replica(event: Event) -> str:
    """Return a replica's name, and how many ranks it has, as `transformer-0 (4 ranks)`."""
    return f"{event.replica} ({event.num_ranks} ranks)" if event.num_ranks > 1 else event.replica


def _attempt(event: Event) -> str:
    return f", attempt {event.attempt + 1}" if event.attempt else ""


def summary(totals: Totals) -> str:
    """Return the progress of all requests, as `3 of 60 videos done, 1 failed, 4.2 a minute, 12 min left`."""
    of = "" if totals.total is None else f" of {totals.total}"
    parts = [f"{totals.done}{of} {totals.makes}s done"]
    if totals.failed:
        parts.append(f"{totals.failed} failed")
    if totals.videos_per_min is not None:
        parts.append(_rate(totals.videos_per_min))
    if totals.seconds_left:
        parts.append(f"{human_seconds(totals.seconds_left)} left")
    return ", ".join(parts)


def _rate(per_min: float) -> str:
    return f"{per_min:.1f} a minute" if per_min >= 1 else f"{per_min * 60:.1f} an hour"


def _handlers(stream: TextIO) -> Iterator[logging.StreamHandler[TextIO]]:
    """Yield every log handler that writes to a stream."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                yield handler
