"""Checks a Ray cluster: surveys every node, and pulls between pools on different nodes and GPUs."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
from ray._private.state import available_resources_per_node
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.config.transport import TransportConfig
from disagg_ray.doctor.check import Check, at, fail, fail_unless, ok, skipped, warn, warn_unless
from disagg_ray.doctor.machine import Survey
from disagg_ray.doctor.probe import Opened, Probe, check_link
from disagg_ray.doctor.security import check_mooncake_ports
from disagg_ray.driver.cluster import total_resources
from disagg_ray.errors import DisaggError

logger = logging.getLogger("disagg_ray")

K = TypeVar("K")

START_S = 90.0
"""Until a probe must have started and surveyed its machine; it imports torch."""
OPEN_S = 60.0
PING_S = 10.0
ALL_PAIRS = 8
"""Most probes of which every ordered pair is tried; of more: a ring, and all with the first."""
NUM_PINGS = 5
SKEW_S = 0.5
"""Clocks further apart make timings across nodes useless."""


@dataclass(frozen=True)
class Node:
    """A live node of the cluster."""

    name: str
    id: str
    host: str
    num_gpus: int
    free_gpus: int


@dataclass(frozen=True)
class Prober:
    """A launched probe."""

    name: str
    node: Node
    handle: ActorHandle[Any]


def find_nodes() -> list[Node]:
    """Return the live nodes, named by host, with a number where several share one."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    free = available_resources_per_node()
    hosts = [node["NodeManagerHostname"] for node in alive]
    nodes = []
    for index, found in enumerate(alive):
        host, node_id = hosts[index], found["NodeID"]
        name = host if hosts.count(host) == 1 else f"{host}#{hosts[: index + 1].count(host)}"
        free_gpus = int(free.get(node_id, {}).get("GPU", 0))
        nodes.append(Node(name, node_id, found["NodeManagerAddress"], int(found["Resources"].get("GPU", 0)), free_gpus))
    return nodes


def check_resources(stages: Mapping[str, StageConfig]) -> Iterator[Check]:
    """Compare the resources of the stages with those of the cluster, in all and free."""
    have, free = ray.cluster_resources(), ray.available_resources()
    asked = total_resources(stages)
    for kind, number in ((kind, asked[kind]) for kind in ("CPU", "GPU") if asked[kind]):
        detail = f"{number:g} {kind}s needed, {have.get(kind, 0):g} in the cluster, {free.get(kind, 0):g} free"
        if number > have.get(kind, 0):
            key = f"stages.*.num_{kind.lower()}s"
            yield fail("resources", detail, f"lower stages.*.replicas or {key}, or add nodes: ray start --address=...")
        else:
            remedy = "wait until other work is done, or see what uses them: ray list actors"
            yield warn_unless(number <= free.get(kind, 0), "resources", detail, remedy)


def check_cluster(config: Config, here: Survey, pool_bytes: int | None) -> Iterator[Check | Survey]:
    """Survey every node of the joined cluster, and pull from each probe's pool into those of others.

    Yields the survey of each node too. `here` is the driver's.
    """
    nodes = find_nodes()
    num_gone = sum(not node["Alive"] for node in ray.nodes())
    yield ok("nodes", f"{len(nodes)} alive" + (f", {num_gone} gone" if num_gone else ""))
    for node in nodes:
        if node.num_gpus and not node.free_gpus:
            busy = f"all {node.num_gpus} are in use: their memory and routes are not checked"
            yield from at(node.name, [skipped("gpu", busy)])
    logger.info("doctor: starting probes, nodes: %d", len(nodes))
    probers = launch(nodes, config.transport)
    try:
        started: list[Prober] = []
        yield from _survey(probers, here, pool_bytes, started)
        yield from _check_clocks(started)
        opened: dict[Prober, Opened] = {}
        yield from _open(started, config.transport, opened)
        yield from _check_links(opened, config.transport)
    finally:
        for prober in probers:
            ray.kill(prober.handle)


def launch(nodes: Sequence[Node], transport: TransportConfig) -> list[Prober]:
    """Start the probes of every node."""
    probers = []
    for node in nodes:
        devices = probe_devices(node.free_gpus, alone=len(nodes) == 1)
        for index, device in enumerate(devices):
            name = node.name if len(devices) == 1 else f"{node.name}/{index}"
            options: dict[str, Any] = {"num_cpus": 0, "num_gpus": int(device == "cuda"), "max_restarts": 0}
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node.id, soft=False)
            actor_class: Any = ray.remote(**options)(Probe)
            handle = cast("ActorHandle[Any]", actor_class.remote(name, transport, device))
            probers.append(Prober(name, node, handle))
    return probers


def probe_devices(free_gpus: int, *, alone: bool) -> list[str]:
    """Return the devices of a node's pools: two of its free GPUs, else host memory; a lone node has two pools."""
    on_gpus = ["cuda"] * min(2, free_gpus)
    return on_gpus + ["cpu"] * max(0, (2 if alone else 1) - len(on_gpus))


def answers(calls: Mapping[K, Any], timeout_s: float) -> Iterator[tuple[K, Any, str]]:
    """Wait for a call of each probe; yield each with its answer, or with its error."""
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
    for prober, call in calls.items():
        if call not in done:
            yield prober, None, f"no answer within {timeout_s:g} s"
            continue
        try:
            yield prober, ray.get(call), ""
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            yield prober, None, str(cause if isinstance(cause, DisaggError) else error).strip().splitlines()[-1].strip()


def _survey(
    probers: Sequence[Prober], here: Survey, pool_bytes: int | None, started: list[Prober]
) -> Iterator[Check | Survey]:
    """Survey each node once; of the driver's node, yield only checks that differ from the driver's own survey.

    Appends the probes that answer to `started`.
    """
    known = {(check.name, check.status) for check in here.checks}
    driver_node = ray.get_runtime_context().get_node_id()
    calls = {prober: prober.handle.survey.remote(pool_bytes) for prober in probers}
    for prober, found, error in answers(calls, START_S):
        if error:
            remedy = "install this version of disagg-ray on the node, and see `ray logs` for why the probe died"
            yield from at(prober.node.name, [fail("node", f"the probe did not start: {error}", remedy)])
            continue
        is_first = prober.node not in [other.node for other in started]
        started.append(prober)
        if is_first:
            yield found
            is_here = prober.node.id == driver_node
            news = [check for check in found.checks if not (is_here and (check.name, check.status) in known)]
            yield from at(prober.node.name, [*news, check_versions(here.versions, found.versions)])


def check_versions(here: Mapping[str, str], there: Mapping[str, str]) -> Check:
    """Compare the packages that must be equal on all nodes, because they exchange pickles."""
    differing = [name for name in here if here[name] != there.get(name, "none")]
    if differing:
        detail = "; ".join(f"{name} {there.get(name, 'none')}, but {here[name]} in the driver" for name in differing)
    else:
        detail = "as in the driver: " + ", ".join(f"{name} {here[name]}" for name in ("python", "ray"))
    remedy = "install the same versions on every node: pip install -c constraints.txt '.[...]'"
    return fail_unless(not differing, "versions", detail, remedy)


def _check_clocks(probers: Sequence[Prober]) -> Iterator[Check]:
    for prober in {prober.node.name: prober for prober in probers}.values():
        skews: list[tuple[float, float]] = []
        for _ in range(NUM_PINGS):
            sent = time.time()
            ((_, clock, error),) = answers({prober: prober.handle.now.remote()}, PING_S)
            received = time.time()
            if not error:
                skews.append(((received - sent) / 2, clock - (sent + received) / 2))
        if skews:
            exact_s, skew_s = min(skews)
            yield from at(prober.node.name, [check_clock(skew_s, exact_s)])


def check_clock(skew_s: float, exact_s: float) -> Check:
    """Judge how far a node's clock is ahead of the driver's, measured to +- `exact_s`."""
    detail = f"{skew_s * 1000:+.1f} ms from the driver's, exact to {exact_s * 1000:.1f} ms"
    if abs(skew_s) - exact_s <= SKEW_S:
        return ok("clock", detail)
    return warn("clock", f"{detail}: timings across nodes are wrong", "timedatectl set-ntp true, on both nodes")


def _open(probers: Sequence[Prober], transport: TransportConfig, opened: dict[Prober, Opened]) -> Iterator[Check]:
    calls = {prober: prober.handle.open.remote(prober.node.host) for prober in probers}
    for prober, found, error in answers(calls, OPEN_S):
        if error:
            yield from at(
                prober.node.name, [fail("pool", error, "correct what this says, and what failed above, first")]
            )
        else:
            opened[prober] = found
    if opened:
        yield check_mooncake_ports([port for found in opened.values() for port in found.ports], transport.port_range)


def pairs(count: int) -> list[tuple[int, int]]:
    """Return the (producer, consumer) pairs to try: all, or of many pools a ring and all with the first."""
    if count <= ALL_PAIRS:
        return list(itertools.permutations(range(count), 2))
    ring = [(index, (index + 1) % count) for index in range(count)]
    star = [pair for other in range(1, count) for pair in ((0, other), (other, 0))]
    return list(dict.fromkeys(ring + star))


def _check_links(opened: Mapping[Prober, Opened], transport: TransportConfig) -> Iterator[Check]:
    probers = list(opened)
    tried = pairs(len(probers))
    if len(probers) > ALL_PAIRS:
        yield ok("links", f"{len(tried)} of {len(probers) * (len(probers) - 1)} pairs are tried: a ring and a star")
    logger.info("doctor: pulling, pairs of pools: %d", len(tried))
    for producer, consumer in ((probers[a], probers[b]) for a, b in tried):  # one at a time: they share the network
        handoff = opened[producer].handoff
        deadline_s = 4 * transport.timeout_s * len(handoff.sessions)
        ((_, link, error),) = answers({consumer: consumer.handle.link.remote(handoff)}, deadline_s)
        if error:
            name = f"{producer.name} -> {consumer.name}"
            yield fail(name, error, f"see `ray logs` of the probe on {consumer.node.name}; is it overloaded?")
        else:
            yield check_link(link, transport)
