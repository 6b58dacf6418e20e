"""How two pools reach each other: the ways into one, and the best way that both ends have.

`nvlink_intra` between GPUs of one machine, `rdma` where there is a device for it, `tcp` always. A pool in GPU memory
is reached by tcp, and by rdma where the card cannot register it, through a pinned copy in host memory: Mooncake's tcp
moves that about twice as fast. Stages in one process (fused, local) hand tensors over as they are, by no route.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from disagg_ray.config import TransportConfig
from disagg_ray.errors import ConfigError, TransferError
from disagg_ray.handoff import Session
from disagg_ray.transfer.engine import Engine

logger = logging.getLogger("disagg_ray")

ROUTES = ("nvlink_intra", "rdma", "tcp")
"""Best first."""
INFINIBAND = Path("/sys/class/infiniband")
"""Where the kernel lists RDMA devices."""

HINTS = {
    "nvlink_intra": "; GPU memory is only shared by processes of one PID namespace: run containers with --pid=host"
}
"""What to look at when a route fails that both ends have."""


@dataclass(frozen=True)
class Endpoint:
    """One way into a pool: an engine and the memory that is registered with it."""

    engine: Engine
    session: Session
    memory: torch.Tensor
    """The pool's own, or the copy of it in host memory."""


def open_endpoints(
    host: str, transport: TransportConfig, memory: torch.Tensor, mirror: torch.Tensor
) -> dict[str, Endpoint]:
    """Open every way into a pool that this machine has and `transport.protocol` allows, best first.

    `mirror` is the copy of the pool in host memory; for a pool in host memory, the pool itself.

    Raises:
        ConfigError: `rdma` is asked for and this machine has no device for it.
        TransferError: no way can be opened.
    """
    asked = transport.protocol
    if asked == "rdma" and not rdma_devices():  # Mooncake would go by tcp and not say so
        raise ConfigError(
            f"transport.protocol: 'rdma' is not possible on {host}: it has no RDMA device in {INFINIBAND}; write auto, "
            f"here or in the file that MOONCAKE_CONFIG_PATH names, or run driver and stages where there is one"
        )
    wanted = [route for route in ROUTES if _is_possible(route, memory)] if asked == "auto" else [asked]
    endpoints: dict[str, Endpoint] = {}
    failures: list[TransferError] = []
    for route in wanted:
        for registered in [memory] if route == "nvlink_intra" else [memory, mirror] if route == "rdma" else [mirror]:
            try:
                endpoints[route] = _open(host, transport, route, registered, memory)
                break
            except TransferError as error:
                failures.append(error)
    if not endpoints:
        raise failures[-1]
    for failure in failures:
        logger.warning("a pool does without a route: %s", failure)
    return endpoints


def _open(
    host: str, transport: TransportConfig, route: str, registered: torch.Tensor, memory: torch.Tensor
) -> Endpoint:
    engine = Engine(host, replace(transport, protocol=route))
    engine.register(registered.data_ptr(), registered.nbytes)
    shift = registered.data_ptr() - memory.data_ptr()
    return Endpoint(engine, Session(route, engine.session.name, _machine(), shift), registered)


def _is_possible(route: str, memory: torch.Tensor) -> bool:
    if route == "nvlink_intra":
        return memory.is_cuda and _has_cuda()
    if route == "rdma":
        return bool(rdma_devices())
    return True


def rdma_devices() -> tuple[str, ...]:
    """Return the names of this machine's RDMA devices."""
    return tuple(sorted(path.name for path in INFINIBAND.glob("*")))


def _has_cuda() -> bool:
    """Return whether the installed Mooncake was built for CUDA; one that was not starts all the same."""
    names = {d.metadata["Name"] for d in metadata.distributions(name="mooncake-transfer-engine-non-cuda")}
    if names:
        logger.warning("route nvlink_intra is not used: this Mooncake has no CUDA; install the extra cuda12 or cuda13")
    return not names


def _machine() -> str:
    """Return what tells this machine from others: GPU memory is only shared within one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def shared_sessions(
    endpoints: Mapping[str, Endpoint], offered: Sequence[Session], broken: set[tuple[str, str]]
) -> list[Session]:
    """Return the ways into another pool that can be taken from here, best first."""
    usable = [
        session
        for session in offered
        if session.route in endpoints
        and (session.route, session.name) not in broken
        and (session.route != "nvlink_intra" or session.machine == endpoints[session.route].session.machine)
    ]
    return sorted(usable, key=lambda session: ROUTES.index(session.route))
