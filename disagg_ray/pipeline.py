"""A pipeline of one's own: start replicas, submit requests, collect results, close."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.driver.api import PipelineApi
from disagg_ray.driver.engine import Engine
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.host import EngineHost
from disagg_ray.errors import ConfigError
from disagg_ray.media.video import to_array
from disagg_ray.models.prompts import check_prompts
from disagg_ray.progress.events import Event
from disagg_ray.replica.messages import Health, ReplicaInfo
from disagg_ray.request import Request, resolve
from disagg_ray.scheduling.admission import Admission


class Pipeline(PipelineApi):
    """Stages on a Ray cluster, driven by an engine in a thread of its own.

    Joins the Ray that is there, or starts one and shuts only that down again. Installs no signal handler.
    """

    def __init__(self, config: Config, on_event: Callable[[Event], None] | None = None) -> None:
        """Start the pipeline; `on_event` is called with every request's progress, on a thread of its own."""
        self.check(config)
        super().__init__(uuid.uuid4().hex[:8], on_event)
        admission = Admission(config.limits.max_queued, config.max_in_flight)
        self._host = EngineHost(config, self.id, admission, self.loop, self.listener)

    @classmethod
    def from_config(
        cls, path: str | Path, *overrides: str, on_event: Callable[[Event], None] | None = None
    ) -> Pipeline:
        """Start the pipeline a YAML file describes; overrides are dotted, as `stages.transformer.replicas=2`.

        Raises:
            ConfigError: the configuration cannot work.
            CheckpointError: the model cannot be loaded.
            StartError: the stages did not become ready.
        """
        return cls(load_config(path, *overrides), on_event)

    @staticmethod
    def check(config: Config) -> None:
        """Check that this kind of pipeline can do all that a configuration asks for.

        Raises:
            ConfigError: names the key.
        """
        for name, stage in config.stages.items():
            if stage.max_replicas is not None:
                raise ConfigError(
                    f"invalid stages.{name}.replicas={{min: {stage.min_replicas}, max: {stage.max_replicas}}}: must be "
                    f"a number here; only a service, which `disagg-ray up` deploys, follows the load"
                )

    @property
    def engine(self) -> Engine:
        """What serves the requests, on the pipeline's own thread."""
        return self._host.engine

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.engine.config

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """Those that serve now."""
        return self.engine.fleet.replicas

    @property
    def num_restarts(self) -> dict[str, int]:
        """How often a replica was replaced, by stage."""
        return dict(self.engine.fleet.num_restarts)

    @property
    def driver_bytes_in_use(self) -> int:
        """Bytes of the driver's own pool that requests take."""
        return self.engine.driver_bytes_in_use

    def submit(self, request: Request, *, wait: bool = True, latents_file: Path | None = None) -> Handle:
        """Check a request and queue it.

        While `limits.max_queued` requests wait to be started, it waits for room; without `wait` it raises.
        `latents_file` keeps the finished latents until the caller deletes it: a request that is submitted again, by
        another process too, resumes from there.

        Raises:
            RequestError: the request cannot be served by this model and configuration, or its id is in flight already.
            Overloaded: there is no room, and `wait` is False.
            Cancelled: the pipeline is closed or draining.
            StartError: a stage has no replica left.
        """
        resolved, images = resolve(request, self.config)
        check_prompts(resolved, self.config.model)
        pixels = {name: torch.from_numpy(to_array(image)) for name, image in images.items()}
        return self._launch(resolved, partial(self.engine.run, images=pixels, latents_file=latents_file, wait=wait))

    def health(self) -> dict[str, Health]:
        """Ask every replica for its health, by name; those that turn out to be lost are left out."""
        return self._host.health()

    def note_written(self, seconds: float) -> None:
        """Have the metrics count what writing a result took."""
        self.loop.call_soon(self.engine.metrics.written, seconds)

    def drain(self, grace_s: float) -> None:
        """Admit no more requests, give those that run `grace_s`, then cancel them. `close` comes after."""
        self._host.drain(grace_s)

    def close(self) -> None:
        """Cancel what runs, end the replicas, and shut down a Ray that this pipeline started. Idempotent.

        Returns within two minutes whatever hangs; that is left behind, which is logged, and ends with the process.
        """
        self._host.close()
