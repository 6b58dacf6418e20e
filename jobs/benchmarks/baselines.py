"""What the scheduler is compared with: round robin, and lower bounds that no schedule can beat."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Requests:
    """A load: when requests arrive (seconds, ascending), their shapes, and their true work (units), each of (n,)."""

    arrivals: Floats
    shapes: Floats
    work: Floats


def round_robin(speeds: Floats, requests: Requests, weighted: bool) -> tuple[Floats, Floats]:
    """Return starts and finishes where request i goes to replica i modulo their number at its arrival, first come
    first served there; weighted: where the share of each replica goes by its speed."""
    free = np.zeros(len(speeds)).tolist()
    starts, finishes = np.empty_like(requests.work), np.empty_like(requests.work)
    for number, replica in enumerate(itertools.islice(turns(speeds, weighted), len(starts))):
        starts[number] = max(requests.arrivals[number], free[replica])
        free[replica] = finishes[number] = starts[number] + requests.work[number] / speeds[replica]
    return starts, finishes


def turns(speeds: Floats, weighted: bool) -> Iterator[int]:
    if not weighted:
        yield from itertools.cycle(range(len(speeds)))
    heap = [(1 / speed, replica) for replica, speed in enumerate(speeds.tolist())]
    heapq.heapify(heap)
    while True:
        at, replica = heap[0]
        heapq.heapreplace(heap, (at + 1 / float(speeds[replica]), replica))
        yield replica


def lower_bound(speeds: Floats, requests: Requests) -> tuple[float, float, float]:
    """Return mean latency, P95 latency and makespan that no schedule can beat, even one that knows all in advance.

    One by one: the mean of one preemptive server with all the speed that serves the shortest remaining first, and of
    each request alone on the fastest replica, whichever is more; of P95 the latter. All at once: the least mean there
    is (the longest request last on the fastest replica, and so on: k-th last on a replica counts k times); P95, the
    shortest 95 % at all the speed. Makespan: all work at all the speed.
    """
    total, alone = speeds.sum(), requests.work / speeds.max()
    if not requests.arrivals.any():
        times = np.sort(np.concatenate([np.arange(1, len(alone) + 1) / speed for speed in speeds]))[: len(alone)]
        shortest = np.sort(requests.work)[: int(0.95 * len(alone))]
        mean = float((np.sort(requests.work)[::-1] * times).mean())
        return (
            mean,
            max(float(shortest.sum() / total), float(np.quantile(alone, 0.95))),
            float(max(requests.work.sum() / total, alone.max())),
        )
    finishes = shortest_remaining_first(requests, float(total))
    mean = max(float((finishes - requests.arrivals).mean()), float(alone.mean()))
    return mean, float(np.quantile(alone, 0.95)), float(max(finishes.max(), (requests.arrivals + alone).max()))


def shortest_remaining_first(requests: Requests, speed: float) -> Floats:
    now, left, finishes = 0.0, [], np.empty_like(requests.work)
    for number, arrival in enumerate([*requests.arrivals.tolist(), np.inf]):
        while left and now + left[0][0] / speed <= arrival:
            remaining, done = heapq.heappop(left)
            now += remaining / speed
            finishes[done] = now
        if left:
            remaining, first = left[0]
            heapq.heapreplace(left, (remaining - (arrival - now) * speed, first))
        now = arrival
        if number < len(finishes):
            heapq.heappush(left, (float(requests.work[number]), number))
    return finishes
