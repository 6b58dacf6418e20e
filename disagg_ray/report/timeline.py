"""Puts the timings of finished requests on one clock: what each replica did when.

A timing has the start of computing and the seconds of each phase; the other times follow. A pull may overlap the
computing of the request before, but its start is not recorded, so it is drawn right before its own computing. The
seconds in the queue include the way of the answer back, so a wait may seem to begin early. Replicas use their node's
clock: the difference of two clocks shifts their lanes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

from disagg_ray.result import StageTiming

Phase: TypeAlias = Literal["compute", "publish", "pull", "wait"]
PHASES: tuple[Phase, ...] = ("compute", "publish", "pull", "wait")
"""What a replica does while it is not idle."""
PAUSE_S = 60.0
"""A longer time without a request is cut out: it is between two runs into one folder."""

Works: TypeAlias = Iterable[tuple[str, Sequence[StageTiming]]]
"""Finished requests: id, and timings in the order of the graph."""


@dataclass(frozen=True)
class Span:
    """One phase on a replica; times are seconds from the timeline's start."""

    phase: Phase
    start: float
    end: float
    request: str


@dataclass(frozen=True)
class Task:
    """One stage's share of a request on its replica."""

    request: str
    timing: StageTiming
    start: float
    """Start of computing."""
    limit: float = math.inf
    """Start of the replica's next task: if its clock was set, they could overlap."""

    @property
    def end(self) -> float:
        return self.spans()[-1].end

    def spans(self) -> tuple[Span, Span, Span, Span]:
        """Return wait, pull, compute and publish, each from the end of the one before.

        Encoding counts as publishing, until the replica computes again.
        """
        timing, pulling = self.timing, self.start - self.timing.pull_s
        computed = min(self.start + timing.compute_s, self.limit)
        end = min(computed + timing.publish_s + timing.encode_s, self.limit)
        return (
            Span("wait", pulling - timing.queue_s, pulling, self.request),
            Span("pull", pulling, self.start, self.request),
            Span("compute", self.start, computed, self.request),
            Span("publish", computed, end, self.request),
        )


@dataclass(frozen=True)
class Lane:
    """One replica's tasks, in order."""

    name: str
    stage: str
    tasks: tuple[Task, ...]

    @property
    def num_ranks(self) -> int:
        """Processes of the replica: the most that it had."""
        return max(task.timing.num_ranks for task in self.tasks)

    @property
    def title(self) -> str:
        """Its name, and how many GPUs or processes a gang took."""
        return entitle(self.name, max((task.timing for task in self.tasks), key=lambda timing: timing.num_ranks))

    def spans(self) -> Iterator[Span]:
        """Yield the replica's spans, in order and without overlap.

        It waits where nothing else is to be seen and the request it takes next was on its way here already.
        """
        free = 0.0
        for span in (span for task in self.tasks for span in task.spans()):
            if free < span.end:
                yield replace(span, start=max(span.start, free))
                free = span.end


@dataclass(frozen=True)
class Pause:
    at: float
    """Seconds from the timeline's start."""
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """The tasks of all replicas that computed anything."""

    began: float
    """Seconds since the epoch."""
    seconds: float
    """Length, without the pauses."""
    lanes: tuple[Lane, ...]
    """In the order of the graph."""
    pauses: tuple[Pause, ...]
    """Cut out: later tasks move up."""

    @property
    def num_replicas(self) -> dict[str, int]:
        """Replicas by stage."""
        stages = [lane.stage for lane in self.lanes]
        return {stage: stages.count(stage) for stage in dict.fromkeys(stages)}

    @property
    def num_ranks(self) -> dict[str, int]:
        """Processes by stage: of a gang each counts."""
        counts = dict.fromkeys(self.num_replicas, 0)
        for lane in self.lanes:
            counts[lane.stage] += lane.num_ranks
        return counts

    @property
    def gpu_seconds(self) -> dict[str, float]:
        """Seconds of computing and publishing by stage, times the GPUs that were reserved for them."""
        spent = dict.fromkeys(self.num_replicas, 0.0)
        for task in (task for lane in self.lanes for task in lane.tasks):
            compute, timing = task.spans()[2], task.timing
            spent[timing.stage] += (compute.end - compute.start + timing.publish_s) * timing.num_gpus
        return spent


def lay_out(works: Works) -> Timeline:
    """Return the timeline of finished requests, of one run or of several into one folder."""
    tasks = [[Task(request, t, t.started) for t in timings] for request, timings in works]
    tasks = [of_one for of_one in tasks if of_one]
    if not tasks:
        return Timeline(0.0, 0.0, (), ())
    windows = sorted((min(t.spans()[0].start for t in of_one), max(t.end for t in of_one)) for of_one in tasks)
    began, gaps = windows[0][0], list(_gaps(windows))
    pauses: list[Pause] = []
    for start, end in gaps:
        pauses.append(Pause(start - began - sum(pause.seconds for pause in pauses), end - start))

    def clock(epoch: float) -> float:
        return epoch - began - sum(end - start for start, end in gaps if end <= epoch)

    lanes = defaultdict(list)
    for of_one in sorted(tasks, key=len, reverse=True):  # the first knows every stage: one resumed knows few
        for task in of_one:
            lane = (task.timing.stage, _lane_of(task.timing))
            lanes[lane].append(Task(task.request, task.timing, clock(task.start)))
    length = max(end for _, end in windows) - began - sum(pause.seconds for pause in pauses)
    return Timeline(began, max(length, 1e-6), _sorted(lanes), tuple(pauses))


def shares(timeline: Timeline) -> dict[str, dict[Phase, float]]:
    """Return by stage the share of its replicas' time that each phase took, 0 to 1; the rest was idle.

    Every rank's time counts: a gang of four weighs as much as four replicas of one.
    """
    counts = timeline.num_ranks
    found: dict[str, dict[Phase, float]] = {stage: dict.fromkeys(PHASES, 0.0) for stage in counts}
    for lane in timeline.lanes:
        for span in lane.spans():
            share = lane.num_ranks / (timeline.seconds * counts[lane.stage])
            found[lane.stage][span.phase] += (span.end - span.start) * share
    return found


def entitle(name: str, timing: StageTiming) -> str:
    """Return a replica's name, with the number of its GPUs, or processes on CPUs, where it is a gang."""
    if timing.num_ranks == 1:
        return name
    return f"{name}, {timing.num_ranks} {'GPUs' if timing.num_gpus else 'ranks'}"


def is_whole(timing: StageTiming) -> bool:
    """Return whether no number is missing, as in a manifest of another version."""
    seconds = (timing.queue_s, timing.pull_s, timing.compute_s, timing.publish_s)
    return all(isinstance(s, int | float) and 0 <= s < math.inf for s in (timing.started, *seconds))


def _lane_of(timing: StageTiming) -> str:
    return timing.stage if timing.replica == "local" else timing.replica


def _gaps(windows: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the pauses between windows that are sorted by their start."""
    reached = windows[0][1]
    for start, end in windows:
        if start - reached > PAUSE_S:
            yield reached, start
        reached = max(reached, end)


def _sorted(lanes: Mapping[tuple[str, str], list[Task]]) -> tuple[Lane, ...]:
    """Return lanes by stage, in the order of the stages' first, and by number."""
    ranks = {stage: rank for rank, stage in enumerate(dict.fromkeys(stage for stage, _ in lanes))}
    order = sorted(lanes, key=lambda lane: (ranks[lane[0]], len(lane[1]), lane[1]))
    return tuple(Lane(name, stage, _limited(lanes[stage, name])) for stage, name in order)


def _limited(tasks: list[Task]) -> tuple[Task, ...]:
    """Return tasks in order, none longer than until the next one starts."""
    tasks = sorted(tasks, key=lambda task: task.start)
    return (*(replace(task, limit=following.start) for task, following in pairwise(tasks)), tasks[-1])
