"""How two pools reach each other: the ways into one, and the best way that both ends have and that works.

`nvlink_intra` between GPUs of one machine, `rdma` where there is a device for it, `tcp` always. A pool in GPU memory
is reached by tcp, and by rdma where the card cannot register it, through a pinned copy in host memory: Mooncake's tcp
moves that about twice as fast. Stages in one process (fused, local) hand tensors over as they are, by no route.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from disagg_ray.config.transport import TransportConfig
from disagg_ray.errors import ConfigError, TransferError
from disagg_ray.transfer.engine import Engine
from disagg_ray.transfer.handoff import Session

logger = logging.getLogger("disagg_ray")

ROUTES = ("nvlink_intra", "rdma", "tcp")
"""Best first."""
INFINIBAND = Path("/sys/class/infiniband")
"""Where the kernel lists RDMA devices."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 3600.0
"""How long a route that failed is left out, at first and at most."""
MAX_FAILED = 1_000

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
    host: str,
    transport: TransportConfig,
    memory: torch.Tensor,
    mirror: torch.Tensor,
    taken: frozenset[str] = frozenset(),
) -> dict[str, Endpoint]:
    """Open every way into a pool that this machine has and `transport.protocol` allows, best first.

    `mirror` is the copy of the pool in host memory; for a pool in host memory, the pool itself. None of the `taken`
    names is given to a session.

    Raises:
        ConfigError: `rdma` is asked for and this machine has no device for it.
        TransferError: no way can be opened.
    """
    asked = transport.protocol
    if asked == "rdma" and not rdma_devices():  # Mooncake would go by tcp and not say so
        raise ConfigError(
            f"transport.protocol: 'rdma' cannot be used on {host}: it has no RDMA device in {INFINIBAND}; write auto, "
            f"here or in the file that MOONCAKE_CONFIG_PATH names, or run driver and stages where there is one"
        )
    wanted = [route for route in ROUTES if _is_possible(route, memory)] if asked == "auto" else [asked]
    endpoints: dict[str, Endpoint] = {}
    failures: list[TransferError] = []
    for route in wanted:
        for registered in [memory] if route == "nvlink_intra" else [memory, mirror] if route == "rdma" else [mirror]:
            try:
                endpoints[route] = _open(host, replace(transport, protocol=route), registered, memory, taken)
                break
            except TransferError as error:
                failures.append(error)
    if not endpoints:
        raise failures[-1]
    for failure in failures:
        logger.warning("a pool does without a route: %s", failure)
    return endpoints


def _open(
    host: str, transport: TransportConfig, registered: torch.Tensor, memory: torch.Tensor, taken: frozenset[str]
) -> Endpoint:
    engine = Engine(host, transport, taken)
    engine.register(registered.data_ptr(), registered.nbytes)
    shift = registered.data_ptr() - memory.data_ptr()
    return Endpoint(engine, Session(transport.protocol, engine.session.name, _machine(), shift), registered)


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
    """Return what identifies this machine: GPU memory is only shared within one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def shared_sessions(
    endpoints: Mapping[str, Endpoint], offered: Sequence[Session], failed: FailedRoutes
) -> list[Session]:
    """Return the ways into another pool that can be taken from here, best first."""
    usable = [
        session
        for session in offered
        if session.route in endpoints
        and not failed.is_left_out(session)
        and (session.route != "nvlink_intra" or session.machine == endpoints[session.route].session.machine)
    ]
    return sorted(usable, key=lambda session: ROUTES.index(session.route))


class FailedRoutes:
    """Routes to peers that failed. Each is left out for a while, twice as long after each failure, and tried again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pauses: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        """By route and session: how long the pause is, and until when."""

    def is_left_out(self, session: Session) -> bool:
        _, until = self._pauses.get((session.route, session.name), (0.0, -math.inf))
        return self._clock() < until

    def fail(self, session: Session) -> float:
        """Leave a route out from now on; return for how many seconds."""
        key = session.route, session.name
        before, _ = self._pauses.pop(key, (0.0, 0.0))
        pause_s = min(max(FIRST_PAUSE_S, 2 * before), LONGEST_PAUSE_S)
        self._pauses[key] = pause_s, self._clock() + pause_s
        while len(self._pauses) > MAX_FAILED:
            self._pauses.popitem(last=False)
        return pause_s

    def succeed(self, session: Session) -> None:
        self._pauses.pop((session.route, session.name), None)

    def forget(self, name: str) -> None:
        """Hear that the process behind a session is dead."""
        for key in [key for key in list(self._pauses) if key[1] == name]:
            self._pauses.pop(key, None)
