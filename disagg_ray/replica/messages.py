"""What a driver and its replicas send each other in calls; events that replicas publish are in `progress`."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_ray.config.schema import Config
from disagg_ray.graph import StagePorts
from disagg_ray.models.geometry import Geometry
from disagg_ray.progress.channel import Credentials
from disagg_ray.replica.software import Software
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import StageTiming
from disagg_ray.transfer.handoff import AttemptKey, Handoff


@dataclass(frozen=True)
class Description:
    """What a stage is, known before it loads a weight."""

    ports: StagePorts
    geometry: Geometry
    software: Software
    """What the replica runs."""


@dataclass(frozen=True)
class RankInfo:
    """A process of a replica."""

    rank: int
    """0: the replica's own."""
    pid: int
    device: str
    host: str
    """Address of its node."""
    gpu: str
    """Number or name of its GPU there; empty without one."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}{f' GPU {self.gpu}' if self.gpu else ''}, pid {self.pid}"


@dataclass(frozen=True)
class RankMemory:
    """GPU memory of one process; 0 on a CPU."""

    allocated_bytes: int
    """Taken by tensors."""
    peak_bytes: int
    """Most that its torch ever held, what lay free in it included."""


@dataclass(frozen=True)
class ReplicaInfo:
    """A ready replica."""

    name: str
    stage: str
    host: str
    pid: int
    device: str
    pool_bytes: int
    num_rooms: int
    """Requests of the largest size within limits whose outputs fit the pool."""
    weights: dict[str, int]
    """Bytes by component."""
    sessions: tuple[str, ...]
    """Mooncake's names of the ways into its pool."""
    load_s: float
    """What registering the pool and loading the weights took."""
    ready: float
    """When that was done, in seconds since the epoch, by its node's clock."""
    blocks: dict[str, str]
    """What its outputs follow from besides requests, as digests by block (`identity`)."""
    ranks: tuple[RankInfo, ...] = ()
    """Its processes, where they are several."""


@dataclass(frozen=True)
class Task:
    """One attempt of a stage for a request."""

    key: AttemptKey
    request: ResolvedRequest
    handoffs: tuple[Handoff, ...]
    """Where its inputs are; each producer keeps them until it is asked to release them."""
    attempt: int = 0
    """How often the stage was begun for this request before."""
    driver_epoch: str = ""
    """Of the driver that asks."""


@dataclass(frozen=True)
class DriverInfo:
    """Who drives a replica."""

    driver_epoch: str
    """The one that its tasks bear."""
    sessions: tuple[str, ...]
    """Mooncake's names of the ways into the driver's pool."""
    credentials: Credentials | None
    """For telling of progress."""


@dataclass(frozen=True)
class Spec:
    """What a service is to be. Each of its replicas keeps a copy: they outlive their driver."""

    revision: int
    config: Config


@dataclass(frozen=True)
class ReplicaState:
    """What a running replica reports to a new driver."""

    spec: Spec | None
    config: Config
    """With which it was launched."""
    description: Description
    info: ReplicaInfo | None
    """None: it is not ready."""
    fresh: bool
    """It has not been asked to load."""


@dataclass(frozen=True)
class Reply:
    """What came of a task."""

    handoff: Handoff
    """Of the tensors that other stages read."""
    num_frames: int
    """Frames kept for `encode` or `piece`, from the last stage."""
    timing: StageTiming
    has_sound: bool = False


@dataclass(frozen=True)
class Encoded:
    data: bytes
    """The file."""
    seconds: float


@dataclass(frozen=True)
class Health:
    bytes_in_use: int
    bytes_quarantined: int
    pool_bytes: int
    stalled: dict[str, float]
    """Seconds without progress of each kind of work that is being done: reserve, pull, compute, publish, encode.
    Waiting for room that others will make, or for a turn on the GPU, does not count."""
    bytes_kept: int
    """Of the pool, for prompt embeddings that are kept while nothing else needs the room."""
    cache_hits: int
    """Texts whose embeddings were kept."""
    cache_misses: int
    """Texts that had to be encoded."""
    memory: tuple[RankMemory, ...]
    """Of each rank; of others than the first after their latest work."""
    num_videos: int
    """Decoded and not yet fetched."""

    @property
    def gpu_allocated_bytes(self) -> int:
        """GPU memory that all its ranks have taken."""
        return sum(rank.allocated_bytes for rank in self.memory)

    @property
    def gpu_peak_bytes(self) -> int:
        """Most GPU memory that one of its ranks ever held."""
        return max(rank.peak_bytes for rank in self.memory)

    @property
    def stalled_s(self) -> float:
        """The longest of them; 0 when nothing is done."""
        return max(self.stalled.values(), default=0.0)
