"""What Prometheus scrapes of an HTTP service, through `ray.util.metrics` like the pipelines' numbers."""

from __future__ import annotations

import re
import urllib.request
from collections import Counter as Counts
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import ray
from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0]
"""Upper bounds of the histograms' buckets."""
OURS = "disagg_ray_"
SCRAPE_S = 5.0
KEY = re.compile(r'(?<=[{,])key="[^"]*",?')
"""The label of a sample."""


COUNTERS = {
    "http_requests_total": ("Requests, by route and status.", ("route", "status")),
    "http_jobs_total": ("Accepted jobs, by key.", ("key",)),
}
GAUGES = {
    "http_jobs_unfinished": ("Accepted jobs that have not ended.", ("model",)),
    "http_requests_open": ("Requests that are being answered, open streams included.", ()),
}
HISTOGRAMS = {
    "http_request_duration_seconds": ("Seconds until the answer began.", ("route",)),
    "http_first_event_seconds": ("Seconds from accepting a job to its first event.", ()),
}
"""Help and labels by name, below `disagg_ray_`."""


class Metrics:
    """Counts requests and jobs. Labels name routes, statuses, models and keys' names, never prompts, ids or keys."""

    def __init__(self) -> None:
        self._counters = {name: Counter(OURS + name, *about) for name, about in COUNTERS.items()}
        self._gauges = {name: Gauge(OURS + name, *about) for name, about in GAUGES.items()}
        self._histograms = {
            name: Histogram(OURS + name, about, SECONDS, labels) for name, (about, labels) in HISTOGRAMS.items()
        }
        self._answers: deque[tuple[str, int, float]] = deque()
        self._num_open = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request as open, on the event loop."""
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer; `flush` records it, for Ray's metrics take longer than an answer may."""
        self._answers.append((route, status, seconds))

    def flush(self) -> None:
        """Record the answers since the last time, and how many requests are open."""
        self._gauges["http_requests_open"].set(self._num_open)
        answers = [self._answers.popleft() for _ in range(len(self._answers))]
        for (route, status), number in Counts((route, status) for route, status, _ in answers).items():
            self._counters["http_requests_total"].inc(number, {"route": route, "status": str(status)})
        for route, _, seconds in answers:
            self._histograms["http_request_duration_seconds"].observe(seconds, {"route": route})

    def accepted(self, key: str) -> None:
        self._counters["http_jobs_total"].inc(1, {"key": key or "none"})

    def first_event(self, seconds: float) -> None:
        self._histograms["http_first_event_seconds"].observe(seconds)

    def queue(self, unfinished: Mapping[str, int]) -> None:
        for model, number in unfinished.items():
            self._gauges["http_jobs_unfinished"].set(number, {"model": model})


def scrape() -> str:
    """Return this node's metrics of ours, in Prometheus' text form, without names of keys: it is read without one."""
    return "".join(f"{line}\n" for line in without_keys(read()))


def read() -> list[str]:
    """Return the lines of this node's metrics of ours, as Ray's agent has them."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=SCRAPE_S) as answer:
        lines = answer.read().decode().splitlines()
    return [line for line in lines if OURS in line.partition("{")[0]]


def without_keys(lines: Iterable[str]) -> list[str]:
    """Return lines without the label `key`; samples that differ in nothing else are summed."""
    sums: dict[str, float | None] = {}
    for line in lines:
        text, has_key = KEY.subn("", line)
        if has_key:
            sample, _, value = text.rpartition(" ")
            sums[sample] = (sums.get(sample) or 0.0) + float(value)
        else:
            sums[line] = None
    return [line if total is None else f"{line} {total}" for line, total in sums.items()]
