"""The doctor's actor on a node, which surveys the machine and opens a real pool, and the check of a route.

A plain class: `doctor.cluster` applies `ray.remote`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from disagg_ray.config.transport import TransportConfig
from disagg_ray.doctor.check import Check, fail, ok, warn
from disagg_ray.doctor.machine import Survey, survey
from disagg_ray.doctor.security import Port, own_ports
from disagg_ray.errors import ConfigError, PoolError, TransferError
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.routes import HINTS, ROUTES
from disagg_ray.transfer.slots import slot_bytes

PROBE_BYTES = 64 * 2**20
"""Size of the tensor that is pulled: large enough to measure a bandwidth, small enough for any machine."""
SLOW_BYTES_PER_S = 100 * 10**6
NUM_PULLS = 2
"""Per route; the first opens the connection, the faster one counts."""


@dataclass(frozen=True)
class Opened:
    """A probe's pool: the handoff of its tensor, and the ports that it opened."""

    handoff: Handoff
    ports: tuple[Port, ...]


@dataclass(frozen=True)
class Measured:
    """Pulls over one route."""

    route: str
    seconds: float
    """Checksum included; 0 when it failed."""
    error: TransferError | PoolError | None


@dataclass(frozen=True)
class Link:
    """Pulls of one pool from another."""

    producer: str
    consumer: str
    nbytes: int
    measured: tuple[Measured, ...]
    """By route that both ends have, best first."""
    absent: tuple[str, ...]
    """Why each other route cannot be used."""
    on_one_machine: bool


class Probe:
    """A pool on a node."""

    def __init__(self, name: str, transport: TransportConfig, device: str) -> None:
        self.name = name
        self._transport = transport
        self._device = device
        self._pool: Pool | None = None

    def __repr__(self) -> str:  # Ray prefixes log lines and lists actors with it
        return f"doctor {self.name}"

    def survey(self, pool_bytes: int | None) -> Survey:
        return survey(self._transport, pool_bytes, sees_gpus=self._device == "cuda")

    def now(self) -> float:
        """Return this machine's clock, in seconds since the epoch."""
        return time.time()

    def open(self, host: str, nbytes: int = PROBE_BYTES) -> Opened:
        """Allocate and register a pool with room for two tensors of `nbytes`, and publish one.

        Raises:
            ConfigError: Mooncake cannot be loaded, or torch cannot use the GPU.
            TransferError: Mooncake did not start.
        """
        if self._device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "cluster.num_gpus: Ray counts a GPU here, but torch finds none; start Ray with the GPUs that it has"
            )
        before = own_ports()
        self._pool = Pool(self.name, 2 * slot_bytes(nbytes), host, self._transport, self._device)
        key = AttemptKey("doctor", 0)
        self._pool.reserve(key, {"tensor": nbytes}, self._transport.timeout_s)
        tensor = torch.arange(nbytes // 8, dtype=torch.int64, device=self._device)
        return Opened(self._pool.publish(key, {"tensor": tensor}), tuple(own_ports() - before))

    def link(self, handoff: Handoff) -> Link:
        """Pull another probe's tensor over each route that both have."""
        by_route = {session.route: replace(handoff, sessions=(session,)) for session in handoff.sessions}
        shared = [route for route in ROUTES if route in by_route and self.pool.route(by_route[route]) == route]
        absent = [self._why_absent(route, handoff) for route in ROUTES if route not in shared]
        measured = tuple(measure(self.pool, by_route[route]) for route in shared)
        machines = {session.machine for session in (*handoff.sessions, *self.pool.sessions)}
        return Link(handoff.producer, self.name, handoff.nbytes, measured, tuple(absent), len(machines) == 1)

    def _why_absent(self, route: str, handoff: Handoff) -> str:
        ends = {handoff.producer: handoff.sessions, self.name: self.pool.sessions}
        without = [name for name, sessions in ends.items() if route not in [s.route for s in sessions]]
        if not without:
            return f"{route} stays within one machine"
        return f"no {route} at {'either end' if len(without) == 2 else without[0]}"

    @property
    def pool(self) -> Pool:
        assert self._pool is not None, "open comes first"
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def measure(pool: Pool, handoff: Handoff, room_s: float = 5.0) -> Measured:
    """Pull a handoff of one route several times, with its checksum, and return the fastest.

    `room_s` is the deadline for free memory in the pool.
    """
    sizes = {meta.name: meta.spec.nbytes for meta in handoff.tensors}
    route = handoff.sessions[0].route
    seconds = []
    for attempt in range(NUM_PULLS):
        key = AttemptKey(f"{handoff.producer} {route} {time.monotonic_ns()}", attempt)
        try:
            pool.reserve(key, sizes, room_s)
            started = time.monotonic()
            pool.pull(key, handoff)
            seconds.append(time.monotonic() - started)
        except (PoolError, TransferError) as error:
            return Measured(route, 0.0, error)
        finally:
            pool.release(key)
    return Measured(route, min(seconds), None)


def check_link(link: Link, transport: TransportConfig) -> Check:
    """Return which routes work, how fast, and which one is used and why."""
    name = f"{link.producer} -> {link.consumer}"
    asked = f"transport.protocol={transport.protocol}"
    if not link.measured:
        return fail(name, "; ".join(link.absent), f"set transport.protocol=auto: with {asked} the two share no route")
    found = ", ".join(_speed(link, each) for each in link.measured)
    errors = {each.route: each.error for each in link.measured if each.error}
    taken = next((each for each in link.measured if not each.error), None)
    if taken is None:
        return fail(name, found, _remedy(link, errors, transport))
    why = "; ".join(link.absent) or "the best route" if transport.protocol == "auto" else f"{asked}"
    detail = f"{found}; {transport.protocol} takes {taken.route}: {why}"
    if errors:
        return warn(name, detail, f"{_remedy(link, errors, transport)}; or set transport.protocol={taken.route}")
    if link.nbytes / taken.seconds < SLOW_BYTES_PER_S and not link.on_one_machine:
        return warn(name, detail, f"measure the network alone: iperf3 -s on {link.producer}, iperf3 -c from the other")
    return ok(name, detail)


def _speed(link: Link, measured: Measured) -> str:
    if measured.error:
        return f"{measured.route} fails: {measured.error}"
    return f"{measured.route} {link.nbytes / measured.seconds / 1e9:.2f} GB/s"


def _remedy(link: Link, errors: Mapping[str, TransferError | PoolError], transport: TransportConfig) -> str:
    route, error = next(iter(errors.items()))
    if isinstance(error, PoolError):
        return "raise transport.pool_bytes, or lower limits or replicas"
    if error.code == 0:
        return f"see dmesg of {link.producer} and {link.consumer} for memory and network errors, and run this again"
    if route in HINTS:
        return HINTS[route].lstrip("; ")
    ports = f"ports {transport.port_range}" if transport.port_range else "any port (or set transport.port_range)"
    host, _, port = error.session.rpartition(":")
    return f"let {link.consumer} reach {ports} of {host} through the firewall; to try: nc -zv {host} {port}"
