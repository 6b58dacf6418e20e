"""Writes the timeline as Chrome trace events, for ui.perfetto.dev or chrome://tracing.

A process is a stage and a thread a replica, with a second one below for what it pulls; times are whole microseconds,
so that slices nest exactly. Waits overlap, and are asynchronous events of their stage.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any, TypeAlias

from disagg_ray.errors import OutputError
from disagg_ray.media.output import atomic_file
from disagg_ray.report.timeline import Span, Task, Timeline, Works, lay_out

Event: TypeAlias = dict[str, Any]


def write_trace(path: Path, works: Works) -> Path:
    """Write the trace of finished requests.

    Raises:
        OutputError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as sink:
            sink.write(to_trace(lay_out(works)))
    except OSError as error:
        raise OutputError(f"trace: {str(path)!r} could not be written: {error}") from error
    return path


def to_trace(timeline: Timeline) -> bytes:
    """Return the JSON of a timeline."""
    content = {
        "displayTimeUnit": "ms",
        "otherData": {"began": timeline.began, "clock": "seconds since the epoch; trace times count from there"},
        "traceEvents": list(_events(timeline)),
    }
    return json.dumps(content, separators=(",", ":")).encode()


@dataclass(frozen=True)
class _Slice:
    """A task's place in the trace; times in microseconds."""

    pid: int
    tid: int
    start: int
    sent: int
    """Start of its last phase: the arrow to the next stage leaves there."""


def _events(timeline: Timeline) -> Iterator[Event]:
    numbers = count(1)
    pids = {stage: pid for pid, stage in enumerate(timeline.num_replicas, start=1)}
    slices: defaultdict[str, list[_Slice]] = defaultdict(list)
    for stage, pid in pids.items():
        yield from _named("process", stage, pid, 0)
    for tid, lane in zip(count(1, 2), timeline.lanes, strict=False):
        pid = pids[lane.stage]
        yield from _named("thread", lane.title, pid, tid)
        yield from _named("thread", f"{lane.name} pulls", pid, tid + 1)
        earliest = 0.0
        for task in lane.tasks:
            yield from _task(task, pid, tid, earliest, next(numbers))
            earliest = task.start
            *_, compute, publish = task.spans()
            last = publish if _us(publish.start) < _us(publish.end) else compute
            slices[task.request].append(_Slice(pid, tid, _us(task.start), _us(last.start)))
    for request, on_its_way in slices.items():
        for producer, consumer in pairwise(sorted(on_its_way, key=lambda each: each.start)):
            yield from _arrow(request, producer, consumer, next(numbers))
    for pause in timeline.pauses:
        name = f"{pause.seconds:.0f} s without requests left out"
        yield {"ph": "i", "s": "g", "name": name, "ts": _us(pause.at), "pid": 1, "tid": 1}


def _task(task: Task, pid: int, tid: int, earliest: float, number: int) -> Iterator[Event]:
    """Yield a task's slices; its pull is drawn from `earliest` on, as slices of one thread may not overlap."""
    wait, pull, compute, publish = task.spans()
    timing = task.timing
    args = {
        "request": task.request, "pull_s": timing.pull_s, "queue_s": timing.queue_s, "attempts": timing.attempts,
        "pulled_bytes": timing.pulled_bytes, "route": timing.route,
    }  # fmt: skip
    if timing.num_ranks > 1:
        args |= {"ranks": timing.num_ranks, "gpus": timing.num_gpus}
    yield _slice(compute, task.request, pid, tid, args)
    if _us(publish.start) < _us(publish.end):
        yield _slice(publish, "publish", pid, tid, {"request": task.request})
    if _us(pull.start) < _us(pull.end):
        yield _slice(replace(pull, start=max(pull.start, earliest)), "pull", pid, tid + 1, args)
    if _us(wait.start) < _us(wait.end):
        both = {"cat": "wait", "name": "wait", "id": number, "pid": pid, "tid": tid}
        yield both | {"ph": "b", "ts": _us(wait.start), "args": {"request": task.request}}
        yield both | {"ph": "e", "ts": _us(wait.end)}


def _slice(span: Span, name: str, pid: int, tid: int, args: Event) -> Event:
    start, end = _us(span.start), _us(span.end)
    return {
        "ph": "X", "cat": span.phase, "name": name, "ts": start, "dur": end - start, "pid": pid, "tid": tid,
        "args": args,
    }  # fmt: skip


def _arrow(request: str, producer: _Slice, consumer: _Slice, number: int) -> Iterator[Event]:
    """Yield both ends of an arrow; nothing if it would point backwards, as with clocks that differ."""
    if producer.sent <= consumer.start:
        both = {"cat": "request", "name": request, "id": number}
        yield both | {"ph": "s", "ts": producer.sent, "pid": producer.pid, "tid": producer.tid}
        yield both | {"ph": "f", "bp": "e", "ts": consumer.start, "pid": consumer.pid, "tid": consumer.tid}


def _named(kind: str, name: str, pid: int, tid: int) -> Iterator[Event]:
    both = {"ph": "M", "pid": pid, "tid": tid}
    yield both | {"name": f"{kind}_name", "args": {"name": name}}
    yield both | {"name": f"{kind}_sort_index", "args": {"sort_index": pid if kind == "process" else tid}}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
