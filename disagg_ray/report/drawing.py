"""Draws the timeline as SVG, one lane for each replica.

Every column of a lane is filled from the bottom by the share of its time that each phase took. A long task fills whole
columns; where thousands are narrower than a column, the same drawing shows how busy the replica was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from disagg_ray.report.timeline import PHASES, Lane, Phase, Span, Timeline, shares
from disagg_ray.text import printable

WIDTH, LEFT, RIGHT, TOP, MARGIN = 1600, 190, 84, 60, 24
"""Pixels: the whole drawing, and the margins beside and above the lanes."""
MAX_LANES_PX = 1000
"""Height of all lanes, unless that is less than LANE_PX[0] each."""
LANE_PX = (4, 36)
FONT_PX, CHAR_PX = 15, 8.5
"""Height of a line, and the most that a character takes on average."""
MIN_BLOCK_PX = 8
"""Wider tasks are separated by a line."""
MAX_CELLS = 200_000
"""Columns of all lanes: more lanes have wider columns, so that no page grows past a few megabytes."""
COLOURS: dict[Phase, str] = {"compute": "#4477aa", "publish": "#228833", "pull": "#ee6677", "wait": "#ddcc77"}
"""Distinct for colour-blind readers too."""
IDLE, INK = "#ececec", "#222222"
STEPS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30,
    *(60 * m for m in (1, 2, 5, 10, 15, 30)), *(3600 * h for h in (1, 2, 3, 6, 12, 24, 48, 168)),
)  # fmt: skip


@dataclass(frozen=True)
class _Row:
    """Where a lane is drawn."""

    lane: Lane
    top: int
    height: int
    label: str
    busy: float
    """Of the replica, or of the whole stage where lanes are too low for text; from 0 to 1."""


def draw(timeline: Timeline, notes: Sequence[str] = ()) -> str:
    """Return an `<svg>` element of the timeline, with lines of text below it; a file of its own, or part of a page."""
    rows = _rows(timeline)
    bottom = (rows[-1].top + rows[-1].height if rows else TOP) + 2
    below = bottom + 40
    parts = [
        *_legend(), *(part for row in rows for part in _lane(row, timeline.seconds, _columns(len(rows)))),
        *_axis(timeline, bottom),
        *(_text(MARGIN, below + index * (FONT_PX + 7), note) for index, note in enumerate(notes)),
    ]  # fmt: skip
    size = f"0 0 {WIDTH} {below + len(notes) * (FONT_PX + 7)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="system-ui, sans-serif" '
        f'font-size="{FONT_PX}" fill="{INK}" role="img" aria-label="What each replica did when">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{chr(10).join(parts)}\n</svg>\n'
    )


def _columns(num_lanes: int) -> int:
    return max(100, min(WIDTH - LEFT - RIGHT, MAX_CELLS // max(1, num_lanes)))


def _text(x: float, y: float, words: str, anchor: str = "start", fill: str = INK) -> str:
    """Return a line of text centred at `y`."""
    at = f'x="{x:.1f}" y="{y + FONT_PX / 3:.1f}"'
    return f'<text {at} text-anchor="{anchor}" fill="{fill}">{escape(printable(words, 400))}</text>'


def _line(x: float, top: float, y: float, colour: str, more: str = "") -> str:
    return f'<path d="M{x:.1f} {top:.1f}V{y:.1f}" stroke="{colour}"{more}/>'


def _rows(timeline: Timeline) -> list[_Row]:
    """Return the lanes' places; the more lanes, the lower, and lanes too low for text are labelled by stage only."""
    lanes, counts, by_stage = timeline.lanes, timeline.num_replicas, shares(timeline)
    pitch = max(LANE_PX[0], min(LANE_PX[1], MAX_LANES_PX // max(1, len(lanes))))
    rows: list[_Row] = []
    top = TOP
    for before, lane in zip((None, *lanes), lanes, strict=False):
        first = before is None or before.stage != lane.stage
        top += FONT_PX if first and before is not None else 0
        label, busy = lane.title, sum(_computing(span) for span in lane.spans()) / timeline.seconds
        if pitch <= FONT_PX:
            label = f"{lane.stage} x{counts[lane.stage]}" if first else ""
            busy = by_stage[lane.stage]["compute"] + by_stage[lane.stage]["publish"]
        rows.append(_Row(lane, top, pitch - max(1, pitch // 6), label, busy))
        top += pitch
    return rows


def _computing(span: Span) -> float:
    return span.end - span.start if span.phase in ("compute", "publish") else 0.0


def _legend() -> Iterator[str]:
    left = float(LEFT)
    for phase, colour in (*COLOURS.items(), ("idle", IDLE)):
        yield f'<rect x="{left:.0f}" y="16" width="16" height="16" fill="{colour}"/>'
        yield _text(left + 24, 24, phase)
        left += 60 + CHAR_PX * len(phase)
    yield _text(WIDTH - MARGIN, 24, "busy", "end")


def _lane(row: _Row, seconds: float, columns: int) -> Iterator[str]:
    yield f'<rect x="{LEFT}" y="{row.top}" width="{WIDTH - LEFT - RIGHT}" height="{row.height}" fill="{IDLE}"/>'
    for phase, path in _fillings(row, seconds, columns):
        yield f'<path d="{path}" fill="{COLOURS[phase]}"/>'
    middle = row.top + max(row.height, FONT_PX) / 2
    if row.label:
        yield _text(LEFT - 10, middle, row.label, "end")
        yield _text(WIDTH - MARGIN, middle, f"{100 * row.busy:.0f} %", "end")
    scale = (WIDTH - LEFT - RIGHT) / seconds
    blocks = [(LEFT + task.start * scale, LEFT + task.end * scale, task.request) for task in row.lane.tasks]
    if np.median([right - left for left, right, _ in blocks]) > MIN_BLOCK_PX:
        yield from (_line(left, row.top, row.top + row.height, "white") for left, _, _ in blocks)
    fitting = [block for block in blocks if block[1] - block[0] > CHAR_PX * len(block[2]) + 12]
    if row.height > FONT_PX and len(fitting) > 0.7 * len(blocks):
        yield from (_text((left + right) / 2, middle, request, "middle", "white") for left, right, request in fitting)


def _fillings(row: _Row, seconds: float, columns: int) -> Iterator[tuple[Phase, str]]:
    """Yield the path of each phase: stacked rectangles, neighbours of equal height merged."""
    edges = np.linspace(0, seconds, columns + 1)
    spans = list(row.lane.spans())
    spent = np.array([np.diff(_spent([s for s in spans if s.phase == phase], edges)) for phase in PHASES])
    heights = np.round(np.cumsum(spent, axis=0) * columns / seconds * row.height, 1)
    starts = np.flatnonzero(np.r_[True, (np.diff(heights, axis=1) != 0).any(axis=0)])
    lengths = np.diff(np.r_[starts, columns])
    width = (WIDTH - LEFT - RIGHT) / columns
    below = np.zeros(columns)
    for phase, height in zip(PHASES, heights, strict=True):
        path = "".join(
            f"M{LEFT + start * width:.1f} {row.top + row.height - height[start]:.1f}"
            f"h{length * width:.1f}v{height[start] - below[start]:.1f}h{-length * width:.1f}z"
            for start, length in zip(starts, lengths, strict=True)
            if height[start] > below[start]
        )
        if path:
            yield phase, path
        below = height


def _spent(spans: Sequence[Span], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the seconds spent in spans, which are in order, up to each time."""
    if not spans:
        return np.zeros_like(times)
    points = np.array([(span.start, span.end) for span in spans])
    lengths = np.stack([np.zeros(len(points)), points[:, 1] - points[:, 0]], axis=1)
    spent: NDArray[np.float64] = np.interp(times, points.ravel(), np.cumsum(lengths.ravel()))
    return spent


def _axis(timeline: Timeline, bottom: int) -> Iterator[str]:
    seconds, right = timeline.seconds, WIDTH - RIGHT
    longest = STEPS_S[-1] * max(1, math.ceil(seconds / STEPS_S[-1] / 12))
    step = next((step for step in STEPS_S if seconds / step <= 12), longest)
    for index in range(math.floor(seconds / step) + 1 if seconds else 0):
        left = LEFT + index * step / seconds * (right - LEFT)
        yield _line(left, bottom, bottom + 6, INK)
        yield _text(left, bottom + 16, _clock(index * step, step), "middle")
    yield f'<path d="M{LEFT} {bottom}H{right}" stroke="{INK}"/>'
    for pause in timeline.pauses:
        left = LEFT + pause.at / seconds * (right - LEFT)
        yield _line(left, TOP - 8, bottom, INK, ' stroke-dasharray="4"')
        near_end = left > WIDTH - 2 * RIGHT
        words = f"{_clock(pause.seconds, 60)} left out"
        yield _text(left - 5 if near_end else left + 5, TOP - 10, words, "end" if near_end else "start")


def _clock(seconds: float, step: float) -> str:
    """Return a time for the axis, to the precision of its steps."""
    if step < 1:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + " s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    rest = "" if step >= 60 else f":{round(seconds) % 60:02}"
    return f"{hours}:{minutes:02}{rest} h" if hours else f"{minutes}{rest} min"
