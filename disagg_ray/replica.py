"""What runs inside an actor: a stage, its pool, and the calls the driver makes.

A plain class: `placement` applies `ray.remote` where it launches one. Three kinds of threads enter it, each Ray's own
concurrency group: one computes (`run`), one pulls ahead (`prefetch`), two answer control calls.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import psutil
import ray
import torch

from disagg_ray.config import REPLICA_WINDOW, Config
from disagg_ray.errors import Cancelled, ConfigError
from disagg_ray.graph import FRAMES, Graph, StagePorts
from disagg_ray.handoff import AttemptKey, Handoff
from disagg_ray.models.checkpoint import Geometry
from disagg_ray.request import ResolvedRequest
from disagg_ray.stage import RAW, Stage, frame_bytes, frames_in_piece
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.slots import slot_bytes
from disagg_ray.video import Frames, encode


@dataclass(frozen=True)
class Description:
    """What a stage is, known before it loads a weight."""

    ports: StagePorts
    geometry: Geometry


@dataclass(frozen=True)
class ReplicaInfo:
    """A ready replica."""

    name: str
    stage: str
    host: str
    pid: int
    device: str
    pool_bytes: int
    weights: dict[str, int]
    """Bytes by component."""


@dataclass(frozen=True)
class Task:
    """One attempt of a stage for a request."""

    key: AttemptKey
    request: ResolvedRequest
    handoffs: tuple[Handoff, ...]
    """Where its inputs lie; each producer keeps them until it is told to release."""


@dataclass(frozen=True)
class Reply:
    """What came of a task, and where the time went, in seconds."""

    handoff: Handoff
    """Of the tensors that other stages read."""
    data: bytes | None
    """The encoded file, from the last stage."""
    num_frames: int
    """Raw frames kept for `piece`, from the last stage."""
    pull_s: float
    started: float
    """When computing began, in seconds since the epoch."""
    compute_s: float
    publish_s: float
    pulled_bytes: int
    route: str
    peak_bytes: int
    """Most GPU memory the replica has ever taken."""


@dataclass(frozen=True)
class Health:
    bytes_in_use: int
    bytes_quarantined: int
    pool_bytes: int
    rss_bytes: int


@dataclass(frozen=True)
class _Pulled:
    tensors: dict[str, torch.Tensor]
    seconds: float


class Replica:
    """One actor of a stage."""

    def __init__(self, stage: str, index: int, config: Config) -> None:
        self.name = f"{stage}-{index}"
        self._config = config
        self._stage = Stage(stage, config)
        self._pulled: dict[AttemptKey, _Pulled] = {}
        self._frames: dict[AttemptKey, Frames] = {}
        self._lock = threading.Lock()  # of the two dictionaries above
        self._pool: Pool

    def __repr__(self) -> str:  # Ray prefixes log lines and lists actors with it
        return self.name

    def describe(self) -> Description:
        return Description(self._stage.ports, self._stage.geometry)

    def load(self, graph: Graph, host: str | None = None) -> ReplicaInfo:
        """Allocate and register the pool, then load the weights.

        Raises:
            ConfigError: `transport.pool_bytes` is too small for the largest request within `limits`.
            CheckpointError: a component cannot be loaded.
        """
        host = host or ray.util.get_node_ip_address()
        self._stage.connect(graph)
        self._pool = Pool(
            self.name, pool_bytes(self._config, self._stage), host, self._config.transport, self._stage.device
        )
        self._stage.load()
        pid = psutil.Process().pid
        name, device = self._stage.name, self._stage.device
        return ReplicaInfo(self.name, name, host, pid, device, self._pool.capacity, self._stage.weights)

    def prefetch(self, task: Task) -> None:
        """Reserve room for a task and pull its inputs, while another computes."""
        pulled = self._pull(task)
        with self._lock:
            self._pulled[task.key] = pulled
        if self._pool.is_released(task.key):
            self.release(task.key)

    def run(self, task: Task) -> Reply:
        """Compute a task and publish its outputs.

        Raises:
            Cancelled: the task was released meanwhile; a denoise stops within one step.
            TransferError: its inputs could not be pulled.
        """
        with self._lock:
            pulled = self._pulled.pop(task.key, None)
        if pulled is None:
            pulled = self._pull(task)
        try:
            return self._compute(task, pulled)
        except BaseException:
            self.release(task.key)
            raise

    def _pull(self, task: Task) -> _Pulled:
        started = time.monotonic()
        wanted = {h: [t for t in h.tensors if t.name in self._stage.ports.inputs] for h in task.handoffs}
        sizes = {t.name: t.spec.nbytes for metas in wanted.values() for t in metas}
        try:
            self._pool.reserve(task.key, sizes | self._stage.output_bytes(task.request))
            tensors: dict[str, torch.Tensor] = {}
            for handoff, metas in wanted.items():
                tensors |= self._pool.pull(task.key, handoff, [meta.name for meta in metas])
        except BaseException:
            self.release(task.key)
            raise
        return _Pulled(tensors, time.monotonic() - started)

    def _compute(self, task: Task, pulled: _Pulled) -> Reply:
        request = task.request

        def stop_when_released(step: int, steps: int) -> None:
            if self._pool.is_released(task.key):
                raise Cancelled(f"request {request.id} was given up at step {step} of {steps}")

        began, started = time.time(), time.monotonic()
        outputs = self._stage.compute(request, pulled.tensors, stop_when_released)
        computed = time.monotonic()
        handoff = self._pool.publish(task.key, outputs.tensors)
        data, num_frames = self._finish(task, outputs.frames)
        self._pool.release(task.key, pulled.tensors)
        return Reply(
            handoff=handoff,
            data=data,
            num_frames=num_frames,
            pull_s=pulled.seconds,
            started=began,
            compute_s=computed - started,
            publish_s=time.monotonic() - computed,
            pulled_bytes=sum(tensor.nbytes for tensor in pulled.tensors.values()),
            route=self._pool.route(task.handoffs[0]) if task.handoffs else "none",
            peak_bytes=self._stage.peak_bytes,
        )

    def _finish(self, task: Task, frames: Frames | None) -> tuple[bytes | None, int]:
        if frames is None:
            return None, 0
        if task.request.format not in RAW:
            return encode(frames, task.request.fps, task.request.format, self._config.output.scale), 0
        with self._lock:
            self._frames[task.key] = frames
        return None, len(frames)

    def piece(self, key: AttemptKey, start: int) -> Handoff:
        """Publish the raw frames of a finished task from frame `start` on, as many as travel at once."""
        with self._lock:
            frames = self._frames[key]
        _, height, width, _ = frames.shape
        stop = start + frames_in_piece(height * width, len(frames))
        return self._pool.publish(key, {FRAMES: torch.from_numpy(frames[start:stop])})

    def release(self, key: AttemptKey) -> None:
        """Give a task up or forget its outputs: frees its slots, stops it if it runs. Idempotent."""
        self._pool.release(key)
        with self._lock:
            self._pulled.pop(key, None)
            self._frames.pop(key, None)

    def health(self) -> Health:
        rss = psutil.Process().memory_info().rss
        return Health(self._pool.bytes_in_use, self._pool.bytes_quarantined, self._pool.capacity, rss)

    def close(self) -> None:
        """Give the pool back."""
        self._pool.close()


def pool_bytes(config: Config, stage: Stage) -> int:
    """Return the memory that a replica of a stage registers.

    Raises:
        ConfigError: `transport.pool_bytes` is too small for the largest request within `limits`.
    """
    needs, asked = stage.needs(), config.transport.pool_bytes
    if asked == "auto":
        return REPLICA_WINDOW * needs.input_bytes + config.max_in_flight * needs.output_bytes
    if int(asked) < needs.minimum:
        raise ConfigError(
            f"transport.pool_bytes: {asked} is too small: the largest request within limits takes {needs.minimum} "
            f"bytes of a {stage.name}'s pool ({needs.input_bytes} in, {needs.output_bytes} out)"
        )
    return int(asked)


def driver_pool_bytes(config: Config, graph: Graph, geometry: Geometry) -> int:
    """Return the host memory the driver needs: each admitted request's images, and pieces of raw frames.

    Raises:
        ConfigError: `transport.driver_pool_bytes` is too small.
    """
    limits = config.limits
    sizes = geometry.tensor_bytes(limits.max_pixels, limits.max_frames, limits.max_image_pixels)
    images = sum(slot_bytes(sizes[name]) for name in {name for _, names in graph.images for name in names})
    piece = slot_bytes(frames_in_piece(limits.max_pixels, limits.max_frames) * frame_bytes(limits.max_pixels))
    asked, minimum = config.transport.driver_pool_bytes, images + piece
    if asked == "auto":
        return config.max_in_flight * images + REPLICA_WINDOW * piece
    if int(asked) < minimum:
        raise ConfigError(f"transport.driver_pool_bytes: {asked} is too small: one request may take {minimum} bytes")
    return int(asked)
