"""Live bars of progress on a terminal: the one importer of rich here."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from disagg_ray.progress.board import Board, Totals, Track
from disagg_ray.progress.wording import replica_of, shown_id, summary
from disagg_ray.text import human_seconds

MAX_ROWS = 16
NARROW_CHARS = 64
"""Terminals below this width show no bars beside the numbers."""


def fit(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can show bars."""
    return stream.isatty() and not Console(file=stream, force_terminal=True).is_dumb_terminal


class Bars:
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
        table.add_row(_line(shown_id(event.request_id)), _line(replica_of(event)), *bar, progress, _clock(track, now))
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


def _handlers(stream: TextIO) -> Iterator[logging.StreamHandler[TextIO]]:
    """Yield every log handler that writes to a stream."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                yield handler
