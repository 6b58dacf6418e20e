"""Replicas that hand tensors over with Mooncake, in a test's own process, for whatever cut of a model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.config.transport import TransportConfig
from disagg_ray.graph import FRAMES, build_graph
from disagg_ray.media.video import to_array
from disagg_ray.replica.actor import Replica
from disagg_ray.replica.messages import Reply, Task
from disagg_ray.request import Request, ResolvedRequest, resolve
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool

HOST = "127.0.0.1"
T = TypeVar("T")
Load = Callable[..., T]

CUTS = THREE, FOUR, TWO, ONE = "three stages", "four stages", "two stages", "one stage"


def recut(config: Config, cut: str) -> Config:
    """Return the configuration of three stages with its blocks laid out otherwise."""
    encoder, transformer, decoder = (config.stages[name].blocks for name in ("encoder", "transformer", "decoder"))
    stages = {
        THREE: {"encoder": encoder, "transformer": transformer, "decoder": decoder},
        FOUR: {"decoder": decoder, "text": encoder[:1], "transformer": transformer, "image": encoder[1:]},
        TWO: {"maker": encoder + transformer, "decoder": decoder},
        ONE: {"fused": encoder + transformer + decoder},
    }[cut]
    return replace(config, stages={name: StageConfig(blocks=blocks) for name, blocks in stages.items()})


@dataclass
class Job:
    """What a driver remembers of a request."""

    key: AttemptKey
    request: ResolvedRequest
    images: Handoff | None
    replies: dict[str, Reply] = field(default_factory=dict)


class Split:
    """Replicas that hand tensors over with Mooncake, in this process, and the driver's part of the work."""

    def __init__(self, config: Config, pool: Pool) -> None:
        self.config = config
        self.pool = pool
        self.replicas = {stage: Replica(stage, 0, config) for stage in config.stages}
        self.graph = build_graph([replica.describe().ports for replica in self.replicas.values()])
        for replica in self.replicas.values():
            replica.load(self.graph, host=HOST)

    def submit(self, request: Request) -> Job:
        resolved, images = resolve(request, self.config)
        key = AttemptKey(request.id, 0)
        pixels = {name: torch.from_numpy(to_array(image)) for name, image in images.items()}
        self.pool.reserve(key, {name: tensor.nbytes for name, tensor in pixels.items()})
        return Job(key, resolved, self.pool.publish(key, pixels) if pixels else None)

    def task(self, job: Job, stage: str) -> Task:
        handoffs = [job.replies[producer].handoff for producer in self.graph.producers(stage)]
        if job.images is not None and self.graph.image_inputs(stage):
            handoffs.append(job.images)
        return Task(job.key, job.request, tuple(handoffs))

    def prefetch(self, job: Job, stage: str) -> None:
        self.replicas[stage].prefetch(self.task(job, stage))

    def run(self, job: Job, stage: str) -> None:
        """Run a stage, and release the producers that nobody needs any more."""
        job.replies[stage] = self.replicas[stage].run(self.task(job, stage))
        for producer in self.graph.producers(stage):
            if job.replies.keys() >= set(self.graph.consumers(producer)):
                self.replicas[producer].release(job.key)

    def collect(self, job: Job, release: bool = True) -> np.ndarray:
        """Pull the frames, piece by piece, and release everything, unless there is more to fetch."""
        frames: list[np.ndarray] = []
        while len(frames) < job.replies[self.graph.last].num_frames:
            piece = self.replicas[self.graph.last].piece(job.key, len(frames))
            key = AttemptKey(f"{job.key.request_id}/piece", len(frames))
            self.pool.reserve(key, {FRAMES: piece.nbytes})
            frames.extend(self.pool.pull(key, piece)[FRAMES].clone().numpy())
            self.pool.release(key)
        if release:
            self.release(job)
        return np.stack(frames)

    def release(self, job: Job) -> None:
        for pool in (*self.replicas.values(), self.pool):
            pool.release(job.key)

    def generate(self, request: Request) -> np.ndarray:
        job = self.submit(request)
        for stage in self.graph.order:
            self.run(job, stage)
        return self.collect(job)

    def bytes_in_use(self) -> dict[str, int]:
        """Return the bytes taken in every pool that has any."""
        used = {stage: replica.health().bytes_in_use for stage, replica in self.replicas.items()}
        return {name: nbytes for name, nbytes in (used | {"driver": self.pool.bytes_in_use}).items() if nbytes}


def start_splits(configure: Callable[..., Config]) -> Iterator[Load[Split]]:
    """Yield what starts replicas of a configuration, once for its arguments, with one driver's pool; then close all."""
    pool = Pool("driver", 2**22, HOST, TransportConfig())
    closing: list[Pool | Replica] = [pool]

    @cache
    def start(*arguments: Any) -> Split:
        split = Split(configure(*arguments), pool)
        closing.extend(split.replicas.values())
        return split

    yield start
    for part in closing:
        part.close()
