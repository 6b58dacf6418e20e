"""The scheduler that the driver uses, on simulated replicas and a simulated clock, beside simpler ways and a bound.

Prefetching is taken to cost nothing, and a takeover neither.
"""

from __future__ import annotations

import heapq
import itertools
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.baselines import Floats, Requests, lower_bound, round_robin
from benchmarks.machine import subplots

from disagg_ray.config.schema import LimitsConfig
from disagg_ray.scheduling.job import Assignment, Job
from disagg_ray.scheduling.scheduler import StageScheduler

SPEEDS = {"slow": 1.0, "middle": 2.0, "fast": 4.0}
"""Units of work a second, by group; the groups are equally large as far as the number of replicas allows."""
MIX = {1.0: 0.70, 3.0: 0.20, 10.0: 0.08, 40.0: 0.02}
"""Share of requests by units of work: many short, few long."""
NOISE = 0.1
"""Standard deviation of the logarithm of the seconds around what work and speed say."""
LOAD = 0.9
"""Of the replicas' total speed, where requests arrive one by one."""
NUM_REPLICAS = (10, 100, 1_000)
NUM_REQUESTS = 100_000
MAX_QUEUED = LimitsConfig().max_queued
"""Requests that wait in the scheduler; those that come when it has as many wait outside, in order."""
QUEUES = (64, 256, 1_024, 4_096)
BLOCK = 1_000
CYCLES = 20 * BLOCK
"""Requests that are timed for each length of the queue."""

OURS, ROUND_ROBIN, WEIGHTED, BOUND = "scheduler", "round robin", "round robin by speed", "lower bound"


@dataclass(frozen=True)
class Row:
    """What one policy did with one load; P95 is the 95th percentile."""

    num_replicas: int
    load: str
    policy: str
    mean_latency_s: float
    """From arrival to finish."""
    p95_latency_s: float
    makespan_s: float
    mean_wait_s: float | None = None
    """From arrival to start."""
    p95_wait_s: float | None = None
    cpu_us: float | None = None
    """CPU time a request spends in the scheduler: push, placement, callbacks and finish."""


@dataclass(frozen=True)
class Cost:
    """CPU time that a finish and a push take together with so many waiting, in microseconds."""

    num_replicas: int
    num_waiting: int
    mean_us: float
    p99_us: float
    best_us: float
    """The mean of the best stretch of BLOCK: what other processes add, by sharing core and caches, is least in it."""


def make_requests(count: int, rate: float | None, seed: int = 0) -> Requests:
    """Draw requests of mixed size that arrive at `rate` a second, or all at 0."""
    random = np.random.default_rng(seed)
    shapes = random.choice(list(MIX), size=count, p=list(MIX.values()))
    arrivals = np.cumsum(random.exponential(1 / rate, count)) if rate else np.zeros(count)
    return Requests(arrivals, shapes, shapes * random.lognormal(-(NOISE**2) / 2, NOISE, count))


def make_replicas(count: int) -> dict[str, str]:
    """Return the group of each replica."""
    return {f"replica-{i}": group for i, group in zip(range(count), itertools.cycle(SPEEDS))}


def speeds_of(replicas: Mapping[str, str]) -> Floats:
    return np.array([SPEEDS[group] for group in replicas.values()])


class Simulation:
    """Replicas that take their time on a clock of their own, in the hands of a real StageScheduler."""

    def __init__(self, replicas: Mapping[str, str], requests: Requests) -> None:
        self.scheduler = StageScheduler()
        self.starts = np.full(len(requests.work), np.nan)
        self.finishes = self.starts.copy()
        self.cpu_s = array("d")
        """CPU time of each call."""
        self._replicas = replicas
        self._requests = requests
        self._jobs: dict[int, Job] = {}
        self._ends: list[tuple[float, int]] = []
        """Of running requests, by their number."""
        self._now = 0.0
        for name, group in replicas.items():
            self.scheduler.add(name, group, 0.0)

    def run(self) -> None:
        """Let every request arrive at its time, until all are done."""
        for number, arrival in enumerate(self._requests.arrivals.tolist()):
            while self._ends and (self._ends[0][0] <= arrival or self.scheduler.num_waiting >= MAX_QUEUED):
                self.finish_next()
            self._now = max(self._now, arrival)
            self.push(number)
        while self._ends:
            self.finish_next()

    def push(self, number: int, priority: int = 0) -> None:
        shape = float(self._requests.shapes[number])
        job = self._jobs[number] = Job(str(number), shape, shape, priority, number, partial(self._on_place, number))
        began = time.thread_time()
        self.scheduler.push(job, self._now)
        self.cpu_s.append(time.thread_time() - began)

    def finish_next(self) -> None:
        self._now, number = heapq.heappop(self._ends)
        self.finishes[number] = self._now
        job, seconds = self._jobs.pop(number), self._now - float(self.starts[number])
        began = time.thread_time()
        self.scheduler.finish(job, self._now, seconds)
        self.cpu_s.append(time.thread_time() - began)

    def _on_place(self, number: int, place: Assignment | None) -> None:
        if place and place.run:
            self.starts[number] = self._now
            seconds = float(self._requests.work[number]) / SPEEDS[self._replicas[place.replica]]
            heapq.heappush(self._ends, (self._now + seconds, number))


def compare(num_replicas: int, num_requests: int) -> Iterator[Row]:
    """Serve requests that come one by one, and all at once, in each way."""
    replicas = make_replicas(num_replicas)
    speeds = speeds_of(replicas)
    work = sum(size * share for size, share in MIX.items())
    for load, rate in (("poisson", LOAD * float(speeds.sum()) / work), ("batch", None)):
        requests = make_requests(num_requests, rate)
        simulation = Simulation(replicas, requests)
        simulation.run()
        us = 1e6 * sum(simulation.cpu_s) / num_requests
        yield _row(num_replicas, load, OURS, requests, simulation.starts, simulation.finishes, us)
        for policy, weighted in ((ROUND_ROBIN, False), (WEIGHTED, True)):
            yield _row(num_replicas, load, policy, requests, *round_robin(speeds, requests, weighted))
        yield Row(num_replicas, load, BOUND, *lower_bound(speeds, requests))


def _row(num_replicas: int, load: str, policy: str, requests: Requests, starts: Floats, finishes: Floats,
         us: float | None = None) -> Row:  # fmt: skip
    waits, latencies = starts - requests.arrivals, finishes - requests.arrivals
    assert (waits >= 0).all() and (latencies > 0).all(), "a request was left out"
    return Row(
        num_replicas, load, policy, float(latencies.mean()), float(np.quantile(latencies, 0.95)),
        float(finishes.max()), float(waits.mean()), float(np.quantile(waits, 0.95)), us,
    )  # fmt: skip


def cost(num_replicas: int, num_waiting: int, cycles: int) -> Cost:
    """Keep a queue at one length, of three priorities, and time a finish and the push of another request."""
    count = num_waiting + 2 * num_replicas
    requests = make_requests(count + cycles, None)
    simulation = Simulation(make_replicas(num_replicas), requests)
    priorities = np.random.default_rng(1).integers(0, 3, count + cycles).tolist()
    for number in range(count):
        simulation.push(number, priorities[number])
    for number in range(count, count + cycles):
        simulation.finish_next()
        simulation.push(number, priorities[number])
    assert simulation.scheduler.num_waiting == num_waiting
    us = 1e6 * np.array(simulation.cpu_s[-2 * cycles :]).reshape(cycles, 2).sum(axis=1)
    best = min(float(us[start : start + BLOCK].mean()) for start in range(0, cycles, BLOCK))
    return Cost(num_replicas, num_waiting, float(us.mean()), float(np.quantile(us, 0.99)), best)


def measure(
    num_replicas: Sequence[int] = NUM_REPLICAS, num_requests: int = NUM_REQUESTS, queues: Sequence[int] = QUEUES
) -> dict[str, Any]:
    cycles = min(CYCLES, num_requests)
    costs = [cost(replicas, waiting, cycles) for replicas in num_replicas for waiting in queues]
    rows = [row for replicas in num_replicas for row in compare(replicas, num_requests)]
    return {
        "num_requests": num_requests, "speeds": SPEEDS, "mix": MIX, "noise": NOISE, "load": LOAD,
        "costs": [asdict(each) for each in costs], "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def report(result: Mapping[str, Any], folder: Path) -> None:
    """Plot, and print tables."""
    costs, rows = [Cost(**each) for each in result["costs"]], [Row(**row) for row in result["rows"]]
    _plot(costs, rows, folder / "bench_scheduler.png")
    print(f"{'replicas':>8}{'waiting':>9}{'CPU us':>9}{'P99':>8}{'best':>8}")
    for each in costs:
        print(f"{each.num_replicas:>8}{each.num_waiting:>9}{each.mean_us:>9.1f}{each.p99_us:>8.1f}"
              f"{each.best_us:>8.1f}")  # fmt: skip
    print(f"\n{'replicas':>8} {'load':<9}{'policy':<22}{'wait s':>10}{'P95':>10}{'latency s':>11}{'P95':>10}"
          f"{'makespan s':>12}{'CPU us':>8}")  # fmt: skip
    for row in rows:
        wait, p95, us = (f"{x:.2f}" if x is not None else "-" for x in (row.mean_wait_s, row.p95_wait_s, row.cpu_us))
        print(f"{row.num_replicas:>8} {row.load:<9}{row.policy:<22}{wait:>10}{p95:>10}{row.mean_latency_s:>11.2f}"
              f"{row.p95_latency_s:>10.2f}{row.makespan_s:>12.1f}{us:>8}")  # fmt: skip


def _plot(costs: list[Cost], rows: list[Row], path: Path) -> None:
    figure, ((cost_axes, wait_axes), (latency_axes, batch_axes)) = subplots(2, 2, figsize=(13, 9))
    for colour, replicas in enumerate(sorted({each.num_replicas for each in costs})):
        mine = [each for each in costs if each.num_replicas == replicas]
        waiting = [each.num_waiting for each in mine]
        cost_axes.plot(waiting, [each.best_us for each in mine], f"C{colour}o-", label=f"{replicas} replicas")
        cost_axes.plot(waiting, [each.mean_us for each in mine], f"C{colour}:")
    cost_axes.axhline(1_000, color="black", linewidth=0.8, linestyle="--")
    cost_axes.set(xscale="log", xlabel="jobs waiting", ylabel="µs of CPU time", yscale="log",
                  title="finish and push (best stretch; dotted: mean; dashed: aim)")  # fmt: skip
    cost_axes.legend()
    poisson, batch = ([row for row in rows if row.load == load] for load in ("poisson", "batch"))
    _bars(wait_axes, poisson, "mean_wait_s", "p95_wait_s")
    wait_axes.set(ylabel="seconds", title=f"arrival to start at {LOAD:.0%} load (line: to P95)")
    wait_axes.set_yscale("symlog", linthresh=0.1)
    wait_axes.autoscale(axis="y")
    _bars(latency_axes, poisson, "mean_latency_s", "p95_latency_s")
    latency_axes.set(yscale="log", ylabel="seconds", title=f"arrival to finish at {LOAD:.0%} load (line: to P95)")
    _bars(batch_axes, batch, "makespan_s")
    batch_axes.set(yscale="log", ylabel="seconds", title="all at once: until the last is done")
    for axes in (cost_axes, wait_axes, latency_axes, batch_axes):
        axes.grid(alpha=0.3)
    batch_axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _bars(axes: Any, rows: list[Row], name: str, upper: str | None = None) -> None:
    """Draw a bar for each policy at each number of replicas; a line reaches on to `upper`."""
    counts = sorted({row.num_replicas for row in rows})
    for colour, policy in enumerate((OURS, ROUND_ROBIN, WEIGHTED, BOUND)):
        mine = [row for row in rows if row.policy == policy and getattr(row, name) is not None]
        at = [counts.index(row.num_replicas) + 0.2 * (colour - 1.5) for row in mine]
        heights = [getattr(row, name) for row in mine]
        axes.bar(at, heights, 0.18, color=f"C{colour}", label=policy)
        if upper:
            axes.vlines(at, heights, [getattr(row, upper) for row in mine], color=f"C{colour}", linewidth=3)
    axes.set_xticks(range(len(counts)), [f"{count} replicas" for count in counts])
