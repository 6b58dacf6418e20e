"""What `disagg-ray plan` predicts beside the real scheduler on simulated GPUs, and beside measured tables."""

from __future__ import annotations

import heapq
import itertools
import json
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.machine import subplots

from disagg_ray.config.schema import REPLICA_WINDOW
from disagg_ray.planning.layouts import Layout
from disagg_ray.planning.plan import Plan, equip, make_plan, parse_gpus
from disagg_ray.planning.predict import Hardware, Prediction
from disagg_ray.planning.profile import VERSION, Load, Point, Profile, StageProfile, read_profile
from disagg_ray.scheduling.job import Assignment, Job
from disagg_ray.scheduling.scheduler import StageScheduler

CLUSTERS = {"2xH200": {}, "4xH200": {}, "8xH200,4xL40S": {"L40S": 0.35}, "700xH200,300xL40S": {"L40S": 0.35}}
"""GPUs, and the speeds of those that the profile is not of."""
LOAD = Load(480, 832, 81, 8)
PASSES = (8, 40)
"""Of the loads that are simulated: 4 and 20 guided steps."""
SECONDS = {"encoder": (0.08, 0.08), "transformer": (5.0, 5.0), "decoder": (3.17, 2.77)}
"""Of Wan 1.3B at four guided steps on an H200, and of them the turns (docs/performance.md): of the simulated."""
NOISE = 0.05
"""Standard deviation of the logarithm of the seconds."""
TINY_S = 1e-9
"""Less than this is done."""
ROUNDS = 12
"""Requests for each GPU; those of the middle are counted."""


@dataclass(frozen=True)
class Row:
    gpus: str
    layout: str
    predicted: float
    """Videos a minute."""
    found: float
    """The same, simulated or measured."""

    @property
    def error(self) -> float:
        return self.predicted / self.found - 1


class Gpu:
    """Jobs that take turns on one GPU, as `disagg_ray.models.gpu_lock` has them."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Job, float, float]] = deque()
        """Jobs, with the seconds each still needs and the most of one turn."""
        self.current: tuple[Job, float, float] | None = None
        """The job that has the turn, with what it will still need after it."""

    def begin_turn(self) -> float | None:
        """Give the next job its turn, if the last is over, and return its seconds."""
        if self.current is not None or not self.waiting:
            return None
        job, left, most = self.waiting.popleft()
        seconds = min(left, most)
        self.current = job, left - seconds, most
        return seconds

    def end_turn(self) -> Job | None:
        """Return the job that is done with this turn; another stands behind those that wait."""
        assert self.current is not None
        (job, left, most), self.current = self.current, None
        if left < TINY_S:
            return job
        self.waiting.append((job, left, most))
        return None


class Simulation:
    """A layout with a real StageScheduler for each stage, on a clock of its own; handoffs take no time."""

    def __init__(self, layout: Layout, kinds: Mapping[str, Hardware], load: Load, num_requests: int) -> None:
        self._now = 0.0
        self._random = np.random.default_rng(0)
        self._kinds, self._load, self._num_requests = kinds, load, num_requests
        stages = tuple(dict.fromkeys(stage for seat in layout.seats for stage in seat.stages))
        order = [stage.name for stage in next(iter(kinds.values())).profile.stages if stage.name in stages]
        self._parts: list[tuple[str, ...]] = [tuple(order)] if layout.fused else [(stage,) for stage in order]
        self._schedulers = [StageScheduler() for _ in self._parts]
        self._homes: dict[str, tuple[str, Gpu]] = {}
        """Kind and GPU of each replica."""
        for seat_number, seat in enumerate(layout.seats):
            for number in range(seat.count):
                gpu = Gpu()
                for place, part in enumerate(self._parts):
                    if set(part) <= set(seat.stages):
                        name = f"{part[0]}-{seat_number}-{number}"
                        self._homes[name] = seat.kind, gpu
                        self._schedulers[place].add(name, seat.kind, 0.0)
        self._began: dict[Job, tuple[int, int, float]] = {}
        """Request, part and start of what runs."""
        self._ends: list[tuple[float, int, Gpu | Job]] = []
        """Of turns, and of jobs that need none any more."""
        self._tails: dict[Job, float] = {}
        """Seconds of each job after its last turn."""
        self._numbers = itertools.count()
        self._admitted = 0
        self.finished: list[float] = []

    def run(self) -> None:
        for _ in range(REPLICA_WINDOW * len(self._homes)):
            self._admit()
        while self._ends:
            self._now, _, ended = heapq.heappop(self._ends)
            if isinstance(ended, Job):
                self._end(ended)
                continue
            if (job := ended.end_turn()) is not None:
                self._schedule(self._tails.pop(job), job)
            self._begin_turn(ended)

    def per_minute(self) -> float:
        first, last = int(0.3 * len(self.finished)), int(0.8 * len(self.finished))
        return 60 * (last - first) / (self.finished[last] - self.finished[first])

    def _admit(self) -> None:
        if self._admitted < self._num_requests:
            self._push(self._admitted, 0)
            self._admitted += 1

    def _push(self, request: int, place: int) -> None:
        job = Job(str(request), 1.0, "", 0, request, lambda _: None)
        job.on_place = partial(self._on_place, job, request, place)
        self._schedulers[place].push(job, self._now)

    def _on_place(self, job: Job, request: int, place: int, at: Assignment | None) -> None:
        if at is None or not at.run:
            return
        kind, gpu = self._homes[at.replica]
        hardware, part = self._kinds[kind], self._parts[place]
        seconds = sum(hardware.compute_s(stage, self._load) for stage in part)
        turns = hardware.turn_s(part[0], self._load) if len(part) == 1 else seconds
        denoises = len(part) == 1 and hardware.stage(part[0]).denoises
        most = turns / self._load.passes if denoises else math.inf
        noise = self._random.lognormal(-(NOISE**2) / 2, NOISE)
        gpu.waiting.append((job, turns * noise, most))
        self._tails[job] = (seconds - turns) * noise
        self._began[job] = request, place, self._now
        self._begin_turn(gpu)

    def _begin_turn(self, gpu: Gpu) -> None:
        if (seconds := gpu.begin_turn()) is not None:
            self._schedule(seconds, gpu)

    def _schedule(self, seconds: float, what: Gpu | Job) -> None:
        heapq.heappush(self._ends, (self._now + seconds, next(self._numbers), what))

    def _end(self, job: Job) -> None:
        request, place, began = self._began.pop(job)
        self._schedulers[place].finish(job, self._now, self._now - began)
        if place + 1 < len(self._parts):
            self._push(request, place + 1)
        else:
            self.finished.append(self._now)
            self._admit()


def published_profile() -> Profile:
    """Return a profile of the numbers that docs/performance.md states."""
    stages = tuple(
        StageProfile(name, name == "transformer", 10, weights, inputs, outputs, 0, (Point(LOAD, *s, 0, work, 0),))
        for (name, s), weights, inputs, outputs, work in zip(
            SECONDS.items(), (11_400_000_000, 2_800_000_000, 250_000_000), (0, 16_800_000, 28_600_000),
            (16_800_000, 28_600_000, 16_800_000), (400_000_000, 2_000_000_000, 9_000_000_000), strict=True,
        )
    )  # fmt: skip
    return Profile(VERSION, "H200", "NVIDIA H200", 141_000_000_000, "exact", {}, "wan2.1-t2v-1.3b", "npy", 3e9, stages)


def simulate(profile: Profile, clusters: Mapping[str, Mapping[str, float]] = CLUSTERS) -> Iterator[Row]:
    """Yield each kind of layout that fits, predicted and simulated."""
    for (gpus, speeds), passes in itertools.product(clusters.items(), PASSES):
        load = replace(LOAD, passes=passes)
        hardware = equip(parse_gpus(gpus), {"H200": profile}, speeds)
        kinds = {each.kind: each for each in hardware}
        for prediction in families(make_plan(hardware, load)):
            total = sum(seat.count for seat in prediction.layout.seats)
            simulation = Simulation(prediction.layout, kinds, load, max(400, ROUNDS * total))
            simulation.run()
            name = f"{prediction.layout.name}: {passes} passes"
            yield Row(gpus, name, prediction.per_minute, simulation.per_minute())


def families(plan: Plan) -> list[Prediction]:
    """Return the best of all layouts that differ in numbers alone."""
    best: dict[str, Prediction] = {}
    for prediction in plan.predictions:
        best.setdefault(re.sub(r"\d+", "N", prediction.layout.name), prediction)
    return list(best.values())


def compare(profile: Profile, tables: Path) -> Iterator[Row]:
    """Yield what was measured (the JSON of `bench.py throughput`) beside what the profile predicts for it."""
    found = json.loads(tables.read_text())
    rows = next(value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict))
    largest = max((point.load for point in profile.stages[0].points), key=lambda load: load.volume)
    for row in rows:
        if row.get("per_minute") and not row.get("cap_gib"):
            steps, _, guided = row["cell"].partition(" steps, ")
            load = Load(
                largest.height, largest.width, largest.num_frames, int(steps) * (2 if guided == "guided" else 1)
            )
            hardware = equip({profile.kind: (row["gpus"], None)}, {profile.kind: profile}, {})
            named = {p.layout.name: p for p in make_plan(hardware, load).predictions}
            if row["way"] in named:
                name = f"{row['way']}: {row['cell']}"
                yield Row(f"{row['gpus']}x{profile.kind}", name, named[row["way"]].per_minute, row["per_minute"])


def measure(profile: Path | None = None, tables: Path | None = None) -> dict[str, Any]:
    given = read_profile(profile) if profile is not None else None
    result = {"simulated": [asdict(row) | {"error": row.error} for row in simulate(published_profile())]}
    if given is not None and tables is not None:
        result["measured"] = [asdict(row) | {"error": row.error} for row in compare(given, tables)]
    return result


def report(result: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Print tables, and plot."""
    for against, rows in result.items():
        print(f"\n| GPUs | layout | predicted videos/min | {against} | error |\n|---|---|---|---|---|")
        for row in rows:
            print(f"| {row['gpus']} | {row['layout']} | {row['predicted']:.2f} | {row['found']:.2f} "
                  f"| {row['error']:+.1%} |")  # fmt: skip
        best = {row["gpus"]: max(r["found"] for r in rows if r["gpus"] == row["gpus"]) for row in rows}
        good = [row for row in rows if row["found"] >= best[row["gpus"]] / 4]
        for which, chosen in (("all", rows), ("those that do a fourth of the best or more", good)):
            worst = max((abs(row["error"]) for row in chosen), default=0.0)
            print(f"worst error, {against}, of {which}: {worst:.1%}")
    _plot(result, folder / "bench_plan.png")


def _plot(result: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    figure, axes = subplots(figsize=(8, 4.5))
    for colour, (against, rows) in enumerate(result.items()):
        errors = [100 * row["error"] for row in rows]
        axes.plot([row["found"] for row in rows], errors, f"C{colour}o", alpha=0.6, label=against)
    axes.axhline(0, color="black", linewidth=0.8)
    for aim in (-10, 10):
        axes.axhline(aim, color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="videos a minute", ylabel="predicted, % more", title="prediction (dotted: aim)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
