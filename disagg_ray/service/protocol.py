"""What a service and its drivers say to each other."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from disagg_ray.config.schema import Config
from disagg_ray.errors import DisaggError
from disagg_ray.replica.messages import ReplicaInfo
from disagg_ray.request import ResolvedRequest


class UnknownRequest(DisaggError):
    """The supervisor does not know the request: it has been restarted since, or another of this id took its place."""


@dataclass(frozen=True)
class SubmitMessage:
    """A request as a driver sends it."""

    request: ResolvedRequest
    images: dict[str, np.ndarray[Any, np.dtype[np.uint8]]]
    """Shape (height, width, 3), by name."""
    keep: bool
    """Whether its finished latents are kept for a driver that comes back."""
    client: str
    """The connection that asks; of two requests of one id at once it sends only what takes the other's place."""
    ticket: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells it from the same request that was submitted before: word that that one is finished may come late."""


@dataclass(frozen=True)
class StageState:
    stage: str
    wanted: int
    """Replicas it is to have."""
    ready: int
    busy: int
    waiting: int
    """Requests that wait for a replica."""
    max_vram_bytes: int
    """GPU memory that its replicas have taken."""


@dataclass(frozen=True)
class Snapshot:
    """How a service is."""

    name: str
    state: str
    """ready, starting, or why it failed."""
    config: Config
    began: float
    """When its supervisor started, in seconds since the epoch."""
    address: str
    """Of the supervisor's node."""
    pid: int
    drivers: dict[str, int] = field(default_factory=dict)
    """Unfinished requests by run id."""
    queued: int = 0
    """Requests that are not admitted yet."""
    stages: tuple[StageState, ...] = ()
    replicas: tuple[ReplicaInfo, ...] = ()
    num_restarts: dict[str, int] = field(default_factory=dict)
    rollout: str = ""
    """What a change of the configuration does now; empty: there is none."""
    driver_bytes_in_use: int = 0
    """Of the supervisor's own pool."""
