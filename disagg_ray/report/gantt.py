"""The timeline as a picture: a lane a replica.

Every column of a lane is filled from the bottom by the share of its time that each phase took. A long task fills whole
columns; where thousands are narrower than a pixel, the same picture shows how busy the replica was.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from disagg_ray.report.timeline import PHASES, Lane, Phase, Span, Timeline, shares

WIDTH = 1600
"""Pixels of the whole picture."""
LEFT, RIGHT, TOP, MARGIN = 190, 84, 60, 24
MAX_LANES_PX = 1000
"""What all lanes share, as long as each gets LANE_PX[0]."""
LANE_PX = (4, 36)
FONT_PX = 15
MIN_BLOCK_PX = 8
"""Wider tasks are set off from each other by a line."""
COLOURS: dict[Phase | None, str] = {
    "compute": "#4477aa", "publish": "#228833", "pull": "#ee6677", "wait": "#ddcc77", None: "#ececec",
}  # fmt: skip
"""Told apart by colour-blind people too; None: idle."""
INK = "#222222"
STEPS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30,
    *(60 * m for m in (1, 2, 5, 10, 15, 30)), *(3600 * h for h in (1, 2, 3, 6, 12, 24, 48, 168)),
)  # fmt: skip


def draw(timeline: Timeline, notes: Sequence[str] = ()) -> bytes:
    """Return a PNG of the timeline, with lines of text below it."""
    rows = _rows(timeline)
    bottom = (rows[-1].top + rows[-1].height if rows else TOP) + 2
    canvas = _Canvas(bottom + 40 + len(notes) * (FONT_PX + 7))
    _legend(canvas)
    for row in rows:
        _lane(canvas, row, timeline.seconds)
    _axis(canvas, timeline, bottom)
    for index, note in enumerate(notes):
        canvas.text((MARGIN, bottom + 40 + index * (FONT_PX + 7)), note)
    return canvas.png()


@dataclass(frozen=True)
class _Row:
    """Where a lane is drawn."""

    lane: Lane
    top: int
    height: int
    label: str
    busy: float
    """Of the replica, or of the whole stage where lanes are too low for text; from 0 to 1."""


class _Canvas:
    """A white picture, and text on it."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH, height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self._font = ImageFont.load_default(FONT_PX)

    def text(self, at: tuple[float, float], words: str, anchor: str = "la", fill: str = INK) -> None:
        words = words.encode("ascii", "replace").decode()  # the font that Pillow brings has no more
        self.draw.text(at, words, fill=fill, font=self._font, anchor=anchor)

    def width_of(self, words: str) -> float:
        return self.draw.textlength(words, font=self._font)

    def png(self) -> bytes:
        sink = io.BytesIO()
        self.image.save(sink, "PNG", optimize=True)
        return sink.getvalue()


def _rows(timeline: Timeline) -> list[_Row]:
    """Return the lanes' places: more lanes are lower ones, and too low for text only stages are named."""
    lanes, counts, by_stage = timeline.lanes, timeline.num_replicas, shares(timeline)
    pitch = max(LANE_PX[0], min(LANE_PX[1], MAX_LANES_PX // max(1, len(lanes))))
    rows: list[_Row] = []
    top = TOP
    for before, lane in zip((None, *lanes), lanes, strict=False):
        first = before is None or before.stage != lane.stage
        top += FONT_PX if first and before is not None else 0
        label, busy = lane.name, sum(_computing(span) for span in lane.spans()) / timeline.seconds
        if pitch <= FONT_PX:
            label = f"{lane.stage} x{counts[lane.stage]}" if first else ""
            busy = by_stage[lane.stage]["compute"] + by_stage[lane.stage]["publish"]
        rows.append(_Row(lane, top, pitch - max(1, pitch // 6), label, busy))
        top += pitch
    return rows


def _computing(span: Span) -> float:
    return span.end - span.start if span.phase in ("compute", "publish") else 0.0


def _legend(canvas: _Canvas) -> None:
    left = float(LEFT)
    for phase, colour in COLOURS.items():
        canvas.draw.rectangle((left, 16, left + 16, 32), fill=colour)
        canvas.text((left + 24, 24), phase or "idle", "lm")
        left += 60 + canvas.width_of(phase or "idle")
    canvas.text((WIDTH - MARGIN, 24), "busy", "rm")


def _lane(canvas: _Canvas, row: _Row, seconds: float) -> None:
    canvas.image.paste(Image.fromarray(_pixels(row.lane, seconds, row.height)), (LEFT, row.top))
    middle = row.top + max(row.height, FONT_PX) / 2
    if row.label:
        canvas.text((LEFT - 10, middle), row.label, "rm")
        canvas.text((WIDTH - MARGIN, middle), f"{100 * row.busy:.0f} %", "rm")
    scale = (WIDTH - LEFT - RIGHT) / seconds
    blocks = [(LEFT + task.start * scale, LEFT + task.end * scale, task.request) for task in row.lane.tasks]
    if np.median([right - left for left, right, _ in blocks]) > MIN_BLOCK_PX:
        for left, _, _ in blocks:
            canvas.draw.line((left, row.top, left, row.top + row.height - 1), fill="white")
    fits = [right - left > canvas.width_of(request) + 12 for left, right, request in blocks]
    if row.height > FONT_PX and np.mean(fits) > 0.7:
        for left, right, request in compress(blocks, fits):
            canvas.text(((left + right) / 2, middle), request, "mm", fill="white")


def _pixels(lane: Lane, seconds: float, height: int) -> NDArray[np.uint8]:
    """Return a lane's picture, of shape (height, columns, 3)."""
    columns = WIDTH - LEFT - RIGHT
    edges = np.linspace(0, seconds, columns + 1)
    spans = list(lane.spans())
    tops = np.cumsum([np.diff(_spent([s for s in spans if s.phase == phase], edges)) for phase in PHASES], axis=0)
    tops *= columns / seconds
    levels = 1 - (np.arange(height) + 0.5) / height
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS.values()], np.uint8)
    which: NDArray[np.intp] = (tops[:, None, :] < levels[:, None]).sum(0)
    return palette[which]


def _spent(spans: Sequence[Span], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the seconds spent in spans, which are in order, up to each time."""
    if not spans:
        return np.zeros_like(times)
    points = np.array([(span.start, span.end) for span in spans])
    lengths = np.stack([np.zeros(len(points)), points[:, 1] - points[:, 0]], axis=1)
    spent: NDArray[np.float64] = np.interp(times, points.ravel(), np.cumsum(lengths.ravel()))
    return spent


def _axis(canvas: _Canvas, timeline: Timeline, bottom: int) -> None:
    seconds, right = timeline.seconds, WIDTH - RIGHT
    step = next((step for step in STEPS_S if seconds / step <= 12), STEPS_S[-1])
    for index in range(math.floor(seconds / step) + 1 if seconds else 0):
        left = LEFT + index * step / seconds * (right - LEFT)
        canvas.draw.line((left, bottom, left, bottom + 6), fill=INK)
        canvas.text((left, bottom + 9), _clock(index * step, step), "ma")
    canvas.draw.line((LEFT, bottom, right, bottom), fill=INK)
    for pause in timeline.pauses:
        left = LEFT + pause.at / seconds * (right - LEFT)
        for top in range(TOP - 8, bottom, 8):
            canvas.draw.line((left, top, left, top + 4), fill=INK)
        words, near_end = f"{_clock(pause.seconds, 60)} left out", left > WIDTH - 2 * RIGHT
        canvas.text((left - 5, TOP - 4) if near_end else (left + 5, TOP - 4), words, "rb" if near_end else "lb")


def _clock(seconds: float, step: float) -> str:
    """Return a time as the axis has it, as exact as its steps."""
    if step < 1:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + " s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    rest = "" if step >= 60 else f":{round(seconds) % 60:02}"
    return f"{hours}:{minutes:02}{rest} h" if hours else f"{minutes}{rest} min"
