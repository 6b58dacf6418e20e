"""Checks that the ranks of a replica can talk: processes placed as a gang's are, which meet and exchange tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import psutil
import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.config.transport import TransportConfig
from disagg_ray.doctor.check import Check, fail, ok, warn
from disagg_ray.doctor.cluster import answers
from disagg_ray.driver.placement import reserve_ranks
from disagg_ray.models.parallel.bandwidth import gather_rate
from disagg_ray.models.parallel.ranks import Ranks
from disagg_ray.replica.gang import rank_options
from disagg_ray.text import printable
from disagg_ray.transfer.sockets import listen

logger = logging.getLogger("disagg_ray")

ROOM_S = 30.0
"""Until there must be room for all ranks at once."""
START_S = 90.0
"""Until they must have started; they import torch."""
TALK_S = 60.0
"""Until they must have met and exchanged tensors. A rendezvous that hangs ends with it."""
JOIN_SHARE = 0.75
"""Of that: how long a rank waits for another one before it says so."""
MAX_CHARS = 200
"""Of an error."""
GATHER_BYTES = 64 * 2**20
"""Of each rank."""
SLOW_BYTES_PER_S = 10 * 10**9
"""Between GPUs that share a video's tokens: a forward of 14B at 480p moves some 27 GB and takes 2 s on two H100."""


@dataclass(frozen=True)
class Place:
    """Where a rank's process is."""

    host: str
    pid: int
    gpu: str
    """Ray's id of its GPU; empty without one."""
    address: str
    """At which other ranks could meet it: a port that is free, of `transport.port_range` if that is set."""

    def __str__(self) -> str:
        return f"{self.host} GPU {self.gpu}" if self.gpu else self.host


class RankProbe:
    """A process that is in a gang's place, and only talks."""

    def __init__(self, rank: int, settings: StageConfig) -> None:
        self._rank, self._parallel, self._device = rank, settings.parallel, settings.torch_device

    def __repr__(self) -> str:  # Ray prefixes log lines and lists actors with it
        return f"doctor rank {self._rank}"

    def place(self, ports: range | None) -> Place:
        host = ray.util.get_node_ip_address()
        with listen(host, ports) as free:
            port = free.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return Place(host, psutil.Process().pid, ",".join(gpus), address)

    def talk(self, address: str, timeout_s: float) -> float:
        """Meet the other ranks; return the bytes per second that it gets from them in an all-gather."""
        ranks = Ranks.join(self._rank, address, self._parallel, self._device, timeout_s)
        rate = gather_rate(ranks, GATHER_BYTES)
        ranks.leave()
        return rate


def check_ranks(
    config: Config, probe_class: type[RankProbe] = RankProbe, *, room_s: float = ROOM_S, talk_s: float = TALK_S
) -> Iterator[Check]:
    """Have the ranks of one replica of each group talk, in the joined cluster."""
    for name, stage in config.stages.items():
        for group, settings in stage.replica_groups.items():
            if settings.parallel.is_gang:
                key = f"stages.{name}.groups.{group}" if group else f"stages.{name}"
                logger.info("doctor: starting %d ranks of %s", settings.parallel.size, key)
                yield _check_gang(key, settings, config.transport, probe_class, room_s, talk_s)


def _check_gang(
    key: str,
    settings: StageConfig,
    transport: TransportConfig,
    probe_class: type[RankProbe],
    room_s: float,
    talk_s: float,
) -> Check:
    """Place a gang's processes, and have them talk."""
    bundles, probes = reserve_ranks(settings), list[ActorHandle[Any]]()
    try:
        if not bundles.wait(room_s):
            return _no_room(key, settings, room_s)
        probes = _launch(settings, bundles, probe_class)
        return _talk(key, settings, transport, probes, talk_s)
    finally:
        for probe in probes:
            ray.kill(probe)
        remove_placement_group(bundles)


def _no_room(key: str, settings: StageConfig, room_s: float) -> Check:
    each = f"{settings.num_gpus:g} GPUs" if settings.num_gpus else f"{settings.num_cpus:g} CPUs"
    where = "in the cluster" if settings.parallel.spread else "on one node"
    other = "" if settings.parallel.spread else ", or let ranks lie on several nodes: parallel.spread=true"
    return warn(
        "ranks", f"{key}: no room {where} for {settings.parallel.size} ranks of {each} each within {room_s:g} s",
        f"wait until other work is done (ray list actors), write a smaller {key}.parallel{other}",
    )  # fmt: skip


def _launch(settings: StageConfig, bundles: PlacementGroup, probe_class: type[RankProbe]) -> list[ActorHandle[Any]]:
    actor: Any = ray.remote(probe_class)
    return [
        cast("ActorHandle[Any]", actor.options(**rank_options(settings, bundles, rank)).remote(rank, settings))
        for rank in range(settings.parallel.size)
    ]


def _talk(
    key: str, settings: StageConfig, transport: TransportConfig, probes: list[ActorHandle[Any]], talk_s: float
) -> Check:
    started = {rank: probe.place.remote(transport.ports) for rank, probe in enumerate(probes)}
    places: dict[int, Place] = {}
    for rank, place, error in answers(started, START_S):
        if error:
            detail = f"{key}: the process of rank {rank} did not start: {error}"
            return fail("ranks", detail, "see `ray logs` for why it died; install this version on every node")
        places[rank] = place
    address, rates, errors = places[0].address, dict[int, float](), dict[int, str]()
    calls = {rank: probe.talk.remote(address, JOIN_SHARE * talk_s) for rank, probe in enumerate(probes)}
    for rank, rate, error in answers(calls, talk_s):
        rates[rank], errors[rank] = rate, error
    return judge(key, settings, transport, places, rates, {rank: error for rank, error in errors.items() if error})


def judge(
    key: str,
    settings: StageConfig,
    transport: TransportConfig,
    places: dict[int, Place],
    rates: dict[int, float],
    errors: dict[int, str],
) -> Check:
    """Return what came of the ranks' talk: bytes per second by rank, and what failed it."""
    on_gpu, parallel = settings.torch_device == "cuda", settings.parallel
    backend = "NCCL" if on_gpu else "gloo"
    where = ", ".join(f"{rank} on {place}" for rank, place in places.items())
    if errors:
        why = "; ".join(f"rank {rank}: {printable(error, MAX_CHARS)}" for rank, error in errors.items())
        detail = f"{key}: its ranks do not talk by {backend}: {why} (ranks {where})"
        return fail("ranks", detail, _remedy(backend, transport, places))
    rate = min(rates.values())
    detail = f"{key}: {parallel.size} ranks, {backend} all-gather {rate / 1e9:.2f} GB/s (ranks {where})"
    if on_gpu and parallel.num_shards > 1 and rate < SLOW_BYTES_PER_S:
        return warn(
            "ranks", f"{detail}: ranks that share a video's tokens exchange some 27 GB a forward (14B, 480p)",
            f"use GPUs that NVLink joins (nvidia-smi topo -m), or {key}.parallel={{cfg: 2}}, which exchanges little",
        )  # fmt: skip
    return ok("ranks", detail)


def _remedy(backend: str, transport: TransportConfig, places: dict[int, Place]) -> str:
    """Return what to type when ranks that run cannot talk."""
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    more = "; NCCL_DEBUG=INFO before `ray start` has NCCL say why, in `ray logs`" if backend == "NCCL" else ""
    if len({place.host for place in places.values()}) == 1:
        shared = "; give containers --shm-size=2g; try NCCL_P2P_DISABLE=1" if backend == "NCCL" else ""
        return f"set {variable} to an interface that is up (ip addr) before `ray start`{shared}{more}"
    host = places[0].host
    ports = f"ports {transport.port_range}" if transport.port_range else "any port (or set transport.port_range)"
    return (
        f"let the other nodes reach {ports} of {host} through the firewall, and all of them each other's ports of "
        f"net.ipv4.ip_local_port_range, which {backend} takes; set {variable} to the interface of these addresses "
        f"(ip addr) before `ray start`{more}"
    )
