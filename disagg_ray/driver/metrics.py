"""Prometheus metrics of a whole pipeline, through `ray.util.metrics`.

The driver's process exports everything: replies of replicas and their answers to `health` say what they do. Ray puts
`ray_` before each name. Dashboard and alerts are in `docker/`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Literal, get_args

from ray.util.metrics import Counter, Gauge, Histogram

from disagg_ray.replica.messages import Health
from disagg_ray.result import StageTiming

Outcome = Literal["done", "failed", "cancelled"]
Cause = Literal["ok", "died", "stalled", "transfer", "error", "cancelled", "drained"]
Reason = Literal["wait", "idle", "asked", "config"]
"""Why a stage gets another number of replicas: long waits, idle replicas, `scale`, or a new configuration."""

DRIVER = "driver"
"""The labels `stage` and `replica` of the driver's own work."""
SECONDS = [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0]
"""Upper bounds of the histograms' buckets."""
NOTHING = 5e-324
"""Declares a counter's series before its first event, without which `increase()` misses that event: Ray refuses 0, and
this, the least positive number, vanishes in the first sum."""

COUNTERS = {
    "requests_total": ("Requests that ended, by outcome.", ("outcome",)),
    "attempts_total": ("Attempts of a stage, by what ended them.", ("stage", "cause")),
    "replica_restarts_total": ("Replicas that were replaced.", ("stage",)),
    "replica_changes_total": ("Changes of how many replicas a stage is to have.", ("stage", "direction", "reason")),
    "task_restarts_total": ("Background tasks of the driver that failed and were started again.", ("task",)),
    "phase_seconds_total": ("Exact seconds of finished stages, by phase.", ("stage", "replica", "phase")),
    "denoise_steps_total": ("Denoising steps, those of failed attempts included.", ("stage", "replica")),
    "transfer_bytes_total": ("Bytes pulled from other pools.", ("stage", "replica", "route")),
    "transfer_seconds_total": ("Seconds of pulls, waiting for room included.", ("stage", "replica", "route")),
    "cache_hits_total": ("Encodings answered from the replica's cache.", ("stage", "replica")),
    "cache_misses_total": ("Encodings that had to be computed.", ("stage", "replica")),
}
GAUGES = {
    "requests_in_flight": ("Requests admitted and not ended.", ()),
    "queue_depth": ("Requests that wait for a replica of a stage.", ("stage",)),
    "replicas_ready": ("Replicas that take requests.", ("stage",)),
    "replicas_starting": ("Replicas that start or load.", ("stage",)),
    "last_progress_timestamp_seconds": ("When a step or a stage last finished, in seconds since the epoch.", ()),
    "pool_used_bytes": ("Bytes of a pool that are taken, a replica's or the driver's.", ("stage", "replica")),
    "pool_capacity_bytes": ("Bytes of a pool, a replica's or the driver's.", ("stage", "replica")),
    "gpu_allocated_bytes": ("GPU memory that a rank of a replica has taken.", ("stage", "replica", "rank")),
    "gpu_peak_bytes": (
        "Most GPU memory that a rank of a replica has ever held, free blocks of its allocator included.",
        ("stage", "replica", "rank"),
    ),
}
HISTOGRAMS = {
    "request_duration_seconds": ("Seconds from admission to the end, by outcome.", ("outcome",)),
    "phase_duration_seconds": ("Seconds of one finished stage, by phase.", ("stage", "phase")),
}
"""Help and tags by name, below `disagg_ray_`; each has the tag `model` too. Ray computes a histogram's sum from the
middles of its buckets: exact seconds are the counters'."""


class Metrics:
    """Counts what the driver reports. Labels name stages, replicas, ranks, routes and models, never requests."""

    def __init__(self, model: str, stages: Iterable[str]) -> None:
        """Declare every series that is known beforehand.

        Args:
            model: `model.path`; only its last part becomes the label.
        """
        tags = {"model": model.rstrip("/").replace(":", "/").rpartition("/")[2]}
        self._counters = {
            name: Counter(f"disagg_ray_{name}", about, ("model", *keys)).set_default_tags(tags)
            for name, (about, keys) in COUNTERS.items()
        }
        self._gauges = {
            name: Gauge(f"disagg_ray_{name}", about, ("model", *keys)).set_default_tags(tags)
            for name, (about, keys) in GAUGES.items()
        }
        self._histograms = {
            name: Histogram(f"disagg_ray_{name}", about, SECONDS, ("model", *keys)).set_default_tags(tags)
            for name, (about, keys) in HISTOGRAMS.items()
        }
        self._state: dict[tuple[str, str], float] = {}
        """Last values of the driver's own gauges, by name and stage ("": none)."""
        self._cache: dict[str, tuple[int, int]] = {}
        """Hits and misses in each replica's last answer."""
        self.in_flight(0)
        self.progressed()
        for outcome in get_args(Outcome):
            self._count("requests_total", NOTHING, outcome=outcome)
        for stage in stages:
            self.queue_depth(stage, 0)
            self._count("replica_restarts_total", NOTHING, stage=stage)
            for cause in get_args(Cause):
                self._count("attempts_total", NOTHING, stage=stage, cause=cause)

    def request_finished(self, outcome: Outcome, seconds: float) -> None:
        """Count a request; `seconds` since it was admitted."""
        self._count("requests_total", 1, outcome=outcome)
        self._histograms["request_duration_seconds"].observe(seconds, {"outcome": outcome})

    def in_flight(self, num_requests: int) -> None:
        if self._state.get(("requests_in_flight", "")) == 0 and num_requests:
            self.progressed()  # it was idle before
        self._set("requests_in_flight", num_requests)

    def queue_depth(self, stage: str, num_requests: int) -> None:
        self._set("queue_depth", num_requests, stage)

    def replicas(self, stage: str, ready: int, starting: int) -> None:
        self._set("replicas_ready", ready, stage)
        self._set("replicas_starting", starting, stage)

    def progressed(self) -> None:
        """Note progress, which resets the alert about a pipeline that makes none while requests are in flight."""
        self._set("last_progress_timestamp_seconds", time.time())

    def steps(self, stage: str, replica: str, num_steps: int) -> None:
        """Count denoising steps as events report them, and the others when the stage is done."""
        self._count("denoise_steps_total", num_steps, stage=stage, replica=replica)
        self.progressed()

    def stage_finished(self, timing: StageTiming) -> None:
        """Count where a finished stage's time went, and what it pulled."""
        phases = {
            "wait": timing.queue_s,
            "pull": timing.pull_s,
            "compute": timing.compute_s,
            "publish": timing.publish_s,
        }
        for phase, seconds in phases.items():
            self._phase(timing.stage, timing.replica, phase, seconds)
        if timing.pulled_bytes:
            where = {"stage": timing.stage, "replica": timing.replica, "route": timing.route}
            self._count("transfer_bytes_total", timing.pulled_bytes, **where)
            self._count("transfer_seconds_total", timing.pull_s, **where)
        self.progressed()

    def encoded(self, stage: str, replica: str, seconds: float) -> None:
        """Count the seconds that encoding one file took."""
        self._phase(stage, replica, "encode", seconds)
        self.progressed()

    def written(self, seconds: float) -> None:
        """Count the seconds that writing one result took."""
        self._phase(DRIVER, DRIVER, "write", seconds)
        self.progressed()

    def attempt(self, stage: str, cause: Cause) -> None:
        self._count("attempts_total", 1, stage=stage, cause=cause)

    def scaled(self, stage: str, before: int, after: int, reason: Reason) -> None:
        """Count a change of how many replicas a stage is to have."""
        direction = "out" if after > before else "in"
        self._count("replica_changes_total", 1, stage=stage, direction=direction, reason=reason)

    def replica_restarted(self, stage: str) -> None:
        self._count("replica_restarts_total", 1, stage=stage)

    def task_restarted(self, name: str) -> None:
        self._count("task_restarts_total", 1, task=name)

    def replica_health(self, stage: str, replica: str, health: Health) -> None:
        """Set a replica's gauges; call it every few seconds, since Ray forgets a gauge that is not set for 20 s."""
        tags = {"stage": stage, "replica": replica}
        self._gauges["pool_used_bytes"].set(health.bytes_in_use, tags)
        self._gauges["pool_capacity_bytes"].set(health.pool_bytes, tags)
        for rank, memory in enumerate(health.memory):
            self._gauges["gpu_allocated_bytes"].set(memory.allocated_bytes, tags | {"rank": str(rank)})
            self._gauges["gpu_peak_bytes"].set(memory.peak_bytes, tags | {"rank": str(rank)})
        hits, misses = self._cache.get(replica, (0, 0))
        if health.cache_hits < hits or health.cache_misses < misses:
            hits = misses = 0  # a new process
        self._count("cache_hits_total", health.cache_hits - hits, **tags)
        self._count("cache_misses_total", health.cache_misses - misses, **tags)
        self._cache[replica] = health.cache_hits, health.cache_misses

    def driver_pool(self, used_bytes: int, pool_bytes: int) -> None:
        """Set the gauges of the driver's own pool."""
        tags = {"stage": DRIVER, "replica": DRIVER}
        self._gauges["pool_used_bytes"].set(used_bytes, tags)
        self._gauges["pool_capacity_bytes"].set(pool_bytes, tags)

    def refresh(self) -> None:
        """Set the driver's own gauges again, before Ray forgets them."""
        for (name, stage), value in self._state.items():
            self._gauges[name].set(value, {"stage": stage} if stage else None)

    def _phase(self, stage: str, replica: str, phase: str, seconds: float) -> None:
        self._count("phase_seconds_total", seconds, stage=stage, replica=replica, phase=phase)
        self._histograms["phase_duration_seconds"].observe(seconds, {"stage": stage, "phase": phase})

    def _set(self, name: str, value: float, stage: str = "") -> None:
        self._state[name, stage] = value
        self._gauges[name].set(value, {"stage": stage} if stage else None)

    def _count(self, name: str, amount: float, **tags: str) -> None:
        if amount > 0:  # Ray refuses 0
            self._counters[name].inc(amount, tags)
