"""Displays progress: live bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Literal, Protocol, TextIO

from disagg_ray.progress.bars import Bars, fit
from disagg_ray.progress.board import Board, Track
from disagg_ray.progress.events import Event
from disagg_ray.progress.wording import describe, shown_id, summary

Mode = Literal["auto", "bars", "lines", "quiet"]

BARS_INTERVAL_S = 0.5
LINE_INTERVAL_S = 1.0


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
        self._mode = mode if mode != "auto" else ("bars" if fit(self._stream) else "lines")
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
                self._view = Bars(self.board, self._stream)
            else:
                self._view = _Lines(self.board, self._changed, self._ended, self._stream)
            self._thread = threading.Thread(target=self._run, name="disagg_ray-display", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
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
            return f"request {shown_id(request_id)}: {'done' if ok else 'failed'}{more}{overall}"
        working = (key for key, track in self._changed.items() if track.event.state != "waiting")
        request_id = next(working, next(iter(self._changed), None))
        if request_id is not None:
            track = self._changed.pop(request_id)
            return f"request {shown_id(request_id)}: {describe(track, time.monotonic())}"
        return None

    def close(self) -> None:
        if self._ended:
            self.draw()
