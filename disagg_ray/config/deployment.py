"""How a deployment runs: the cluster, failures, services that outlive their clients, and what is written."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from disagg_ray.config.rules import MOST_S, Bytes, Check, Count, Positive, Section, at_least, at_most, between, enforce
from disagg_ray.errors import ConfigError
from disagg_ray.text import mask, printable


@dataclass(frozen=True)
class FailuresConfig(Section):
    """When something counts as failed, and how often it is tried again."""

    max_attempts: Annotated[Count, at_most(1000)] = 3
    """Attempts at a stage before the request fails. Attempts that end with their node, or before their replica
    computes, do not count."""
    stall_s: Annotated[float, at_least(1), at_most(MOST_S)] = 600.0
    """Progress timeout, in seconds: a replica that completes no denoising step, encode, decode, pull or file within
    this is replaced. A pull has `transport.timeout_s` first; waiting for memory or for a GPU does not count."""
    answer_s: Annotated[float, at_least(1), at_most(MOST_S)] = 60.0
    """Health-check timeout, in seconds: a replica that does not answer within this is replaced. A busy one answers
    within a second."""
    timeout_s: Annotated[Positive, at_most(MOST_S)] | None = None
    """Request timeout, in seconds, from admission to the last byte of the video; null: none."""
    shutdown_grace_s: Annotated[float, at_least(0), at_most(MOST_S)] = 30.0
    """Seconds that running requests get to finish after SIGTERM or Ctrl-C."""


@dataclass(frozen=True)
class ServiceConfig(Section):
    """Services: pipelines that outlive their clients and are shared by them (`disagg-ray up`)."""

    client_timeout_s: Annotated[Positive, at_most(MOST_S)] = 60.0
    """Heartbeat timeout, in seconds: the requests of a client that sends no heartbeat within this are cancelled."""
    target_wait_s: Positive = 60.0
    """Scale up a stage with {min, max} replicas while a new request would wait longer than this, in seconds."""
    patience_s: Positive = 15.0
    """Seconds for which the wait must exceed target_wait_s before a replica is added."""
    idle_s: Positive = 300.0
    """Seconds for which a stage must have a replica to spare before one is removed."""
    cluster_grows: bool = False
    """Request replicas that do not fit the cluster now, because its autoscaler will add nodes for them."""
    latents_bytes: Bytes = 8 * 2**30
    """Disk space, in bytes, for finished latents of clients that may reconnect; the oldest are evicted."""
    latents_expire_s: Positive = 86400.0
    """Seconds for which those latents are kept."""
    folder: str = "outputs/videos"
    """Where `disagg-ray serve` keeps videos: a path, or a URL that fsspec knows."""
    database: str | None = None
    """Where it keeps its jobs, as postgresql://user@host/name; null: SQLite, the file jobs.db in the folder."""
    api_keys: str | None = None
    """File of its keys, which `disagg-ray keys add` writes; null: no keys, and it answers this machine alone."""
    expires_after_s: Positive | None = None
    """Seconds for which files of a job that has ended are kept; null: until it is deleted."""
    max_bytes: Bytes | None = None
    """Bytes of disk for files of jobs that have ended, uploads included; the oldest are evicted. null: no limit."""
    max_upload_bytes: Bytes = 64 * 2**20
    """Most bytes of a request's body, its files included; more is refused unread."""


@dataclass(frozen=True)
class OutputConfig(Section):
    """What is written."""

    scale: Annotated[int, between(1, 16)] = 1
    """Factor by which videos and images are enlarged for viewing; frames and npy hold them as computed."""


@dataclass(frozen=True)
class ClusterConfig(Section):
    """The Ray cluster."""

    address: str | None = None
    """Ray cluster to join; null: RAY_ADDRESS if it is set, else a local cluster is started."""
    num_gpus: Annotated[int, at_least(0)] | None = None
    """GPUs of a local cluster; null: those that Ray detects. Not for a cluster that is joined."""
    dashboard: bool = False
    """Start the Ray dashboard of a local cluster. Not for a cluster that is joined."""
    start_timeout_s: Annotated[Positive, at_most(MOST_S)] = 1800.0
    """Seconds within which every replica must be ready, downloads and loading included; also how long requests wait
    for a stage that has lost all its replicas."""

    def rules(self) -> Iterator[Check]:
        if self.address is not None:
            yield from joining_rules(self, self.address)


def joining_rules(cluster: ClusterConfig, address: str, prefix: str = "") -> Iterator[Check]:
    """Yield the keys that have no effect on a cluster that is joined."""
    remedy = f"must be left out: it is for a local cluster, and the one of {printable(mask(address))} is joined"
    yield f"{prefix}num_gpus", cluster.num_gpus, cluster.num_gpus is None, remedy
    yield f"{prefix}dashboard", cluster.dashboard, not cluster.dashboard, remedy


def check_joining(cluster: ClusterConfig, address: str) -> None:
    """Check that no key is set that has no effect on a cluster that is joined.

    Raises:
        ConfigError: names the key.
    """
    enforce(joining_rules(cluster, address, "cluster."), ConfigError)
