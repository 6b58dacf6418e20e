"""What a service and its clients send to each other."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from disagg_ray.config.schema import Config
from disagg_ray.errors import DisaggError
from disagg_ray.replica.messages import ReplicaInfo
from disagg_ray.request import ResolvedRequest

P = ParamSpec("P")
T = TypeVar("T")


def answers(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T | DisaggError]]:
    """Have a method return the `DisaggError` that it raises, for `unwrap`: Ray would log and wrap what is raised."""

    @wraps(method)
    async def answer(*args: P.args, **options: P.kwargs) -> T | DisaggError:
        try:
            return await method(*args, **options)
        except DisaggError as error:
            return error

    return answer


class UnknownRequest(DisaggError):
    """The supervisor does not know the request: it has been restarted since, or another of this id replaced it."""


@dataclass(frozen=True)
class SubmitMessage:
    """A request as a client sends it."""

    request: ResolvedRequest
    images: dict[str, np.ndarray[Any, np.dtype[np.uint8]]]
    """Shape (height, width, 3), by name."""
    keep: bool
    """Whether its finished latents are kept for a client that comes back."""
    client: str
    """The connection that sends it; it may replace what it submitted under the same id, others may not."""
    ticket: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Distinguishes it from an earlier submission of the same request, whose end may be reported late."""


@dataclass(frozen=True)
class StageState:
    stage: str
    wanted: int
    """Replicas it is to have."""
    ready: int
    busy: int
    waiting: int
    """Requests that wait for a replica."""
    gpu_bytes: int
    """GPU memory that its replicas have taken."""


@dataclass(frozen=True)
class Snapshot:
    """A service's state."""

    name: str
    state: str
    """ready, starting, or why it failed."""
    config: Config
    began: float
    """When its supervisor started, in seconds since the epoch."""
    age_s: float
    """Seconds since then, whatever became of the wall clocks."""
    address: str
    """Of the supervisor's node."""
    pid: int
    clients: dict[str, int] = field(default_factory=dict)
    """Unfinished requests by run id."""
    queued: int = 0
    """Requests that are not admitted yet."""
    stages: tuple[StageState, ...] = ()
    replicas: tuple[ReplicaInfo, ...] = ()
    num_restarts: dict[str, int] = field(default_factory=dict)
    rollout: str = ""
    """What a change of the configuration does now; empty: none is under way."""
    driver_bytes_in_use: int = 0
    """Of the supervisor's own pool."""
