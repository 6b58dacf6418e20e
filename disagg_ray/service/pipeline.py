"""A pipeline whose replicas outlive it, and which changes while it serves."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from disagg_ray.config.schema import REPLICA_WINDOW, Config
from disagg_ray.driver.fleet import Fleet
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.metrics import Metrics, Reason
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import ConfigError, DisaggError
from disagg_ray.models.identity import identify_setup
from disagg_ray.pipeline import Pipeline
from disagg_ray.progress.events import Event
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import Result
from disagg_ray.scheduling.admission import Admission
from disagg_ray.scheduling.work import measure
from disagg_ray.service.autoscale import Load, Scaler
from disagg_ray.service.fleet import ServiceFleet
from disagg_ray.service.protocol import StageState

logger = logging.getLogger("disagg_ray")

DECIDE_S = 1.0
"""How often the load is looked at."""
FREE = ("replicas", "min_replicas", "max_replicas", "num_gpus", "num_cpus", "memory", "resources", "label_selector",
        "accelerator_type", "placement", "cache_bytes", "denoiser", "vae", "offload", "warm_up")  # fmt: skip
"""Settings of a stage that may change while the pipeline stands. Some of the denoiser's and the VAE's change frames a
little: whoever gives them wants that."""


class ServicePipeline(Pipeline):
    """What the supervisor drives."""

    def __init__(self, config: Config, name: str, on_event: Callable[[Event], None]) -> None:
        self._unfinished: dict[Handle, ResolvedRequest] = {}
        self._changing = asyncio.Lock()
        super().__init__(config, on_event, name)

    @staticmethod
    def check(config: Config) -> None:
        """Check nothing: replicas may follow the load."""

    def _make_fleet(self, metrics: Metrics) -> Fleet:
        return ServiceFleet(self.config, self.id, self._lose, self._fail, metrics)

    async def _start(self) -> None:
        self._admission = Admission(sys.maxsize, 0)  # how much waits is bounded driver by driver
        await super()._start()
        self.setup = await asyncio.to_thread(identify_setup, self.config)
        """Digest of all that besides their requests decides the videos."""
        self._admission.resize(_room(self.config))
        self._background.start("scale", self._scale)

    @property
    def fleet(self) -> ServiceFleet:
        assert isinstance(self._fleet, ServiceFleet)
        return self._fleet

    def enqueue(
        self, request: ResolvedRequest, images: dict[str, torch.Tensor], latents_file: Path | None, driver: str
    ) -> Handle:
        """Queue a request of a driver; never waits."""
        handle = Handle(request)
        self._run_into(handle._future, self._run(handle, images, latents_file, lambda: None, wait=False, driver=driver))
        return handle

    async def _run(self, handle: Handle, *args: Any, **options: Any) -> Result:
        self._unfinished[handle] = handle.request
        try:
            return await super()._run(handle, *args, **options)
        finally:
            del self._unfinished[handle]

    def scale(self, stage: str, replicas: int) -> Future[None]:
        """Have a stage get so many replicas; fails with a ConfigError where it cannot have."""
        return self._change(partial(_scaled, stage=stage, replicas=replicas), "asked", f"{replicas} were asked for")

    def change(self, config: Config) -> Future[None]:
        """Become what another configuration says, replica by replica, losing no request; ends when all serve.

        Fails, and stays as it was, with a ConfigError where it describes another graph or model, or pools of another
        size, and with a DisaggError where a replica does not start.
        """
        return self._change(partial(_changed, after=config), "config", "a new configuration was given")

    def _change(self, make: Callable[[Config], Config], reason: Reason, detail: str) -> Future[None]:
        answer: Future[None] = Future()
        self._run_into(answer, self._become(make, reason, detail))
        return answer

    async def _become(self, make: Callable[[Config], Config], reason: Reason, detail: str) -> None:
        """Become what `make` makes of the configuration in force; one change after the other, so that none is lost."""
        async with self._changing:
            config = make(self.config)
            await (self.fleet.roll_out if reason == "config" else self.fleet.resize)(config)
            for stage, settings in config.stages.items():
                before, after = self.config.stages[stage].num_replicas, settings.num_replicas
                if before != after:
                    logger.info("%s scales from %d to %d replicas: %s", stage, before, after, detail)
                    self._metrics.scaled(stage, before, after, reason)
            if reason == "config":
                self.setup = await asyncio.to_thread(identify_setup, config)
            self.config = config
            self._context = replace(self._context, config=config)
            self._admission.resize(_room(config))

    async def _scale(self) -> None:
        """Let the load decide how many replicas there are, where the configuration leaves that open."""
        scaler = Scaler(self.config.service)
        settings = self.config.service
        while True:
            await asyncio.sleep(DECIDE_S)
            if settings != self.config.service:
                settings = self.config.service
                scaler = Scaler(settings)
            for stage, limits in self.config.stages.items():
                if limits.max_replicas is None or limits.min_replicas is None:
                    continue
                if self._changing.locked():  # what is decided now would be for what is no more
                    break
                decision = scaler.decide(stage, await self._load_of(stage), time.monotonic())
                if decision is not None:
                    make = partial(_resized, stage=stage, replicas=decision.replicas)
                    await self._become(make, decision.reason, decision.detail)

    async def _load_of(self, stage: str) -> Load:
        room = await off_loop(self.fleet.room_for, stage)
        settings, scheduler = self.config.stages[stage], self.fleet.schedulers[stage]
        queued = [request for request in self._unfinished.values() if request.id not in self._travelling]
        before_gate = sum(scheduler.expect(*measure(request, settings.blocks)) for request in queued)
        return Load(
            least=settings.min_replicas or settings.replicas,
            most=settings.most_replicas,
            wanted=settings.replicas,
            ready=len(scheduler.replicas),
            starting=self.fleet.num_starting(stage),
            busy=scheduler.num_running,
            outstanding_s=scheduler.outstanding_seconds(time.monotonic()) + before_gate,
            room=room,
        )

    @property
    def failure(self) -> DisaggError | None:
        """Why nothing can be served any more, if so."""
        return self._failure

    def note_restart(self, name: str) -> None:
        """Have the metrics count a background task of the supervisor's that was started again."""
        self._loop.call_soon_threadsafe(self._metrics.task_restarted, name)

    def survey(self) -> tuple[int, tuple[StageState, ...]]:
        """Return how many requests wait to be admitted, and how each stage is."""

        async def look() -> tuple[int, tuple[StageState, ...]]:
            stages = tuple(self._state(stage) for stage in self.config.stages)
            return len(self._unfinished) - len(self._travelling), stages

        return self._call(look())

    def _state(self, stage: str) -> StageState:
        settings, scheduler = self.config.stages[stage], self.fleet.schedulers[stage]
        names = {info.name for info in self.fleet.replicas if info.stage == stage}
        max_vram_bytes = sum(self.fleet.healths[name].gpu_allocated_bytes for name in names & set(self.fleet.healths))
        numbers = settings.num_replicas, len(scheduler.replicas), scheduler.num_running, scheduler.num_waiting
        return StageState(stage, *numbers, max_vram_bytes)


def check_change(before: Config, after: Config) -> None:
    """Check that a service can become what a configuration says.

    Raises:
        ConfigError: names the key that stands in the way.
    """
    remedy = "it cannot change while the pipeline stands; take it down and up again"
    limits = replace(after.limits, max_queued=before.limits.max_queued)
    pairs = {
        "model": (before.model, after.model),
        "limits": (before.limits, limits),
        "transport": (before.transport, after.transport),
        "share_gpu": (before.share_gpu, after.share_gpu),
        "gpu_turns": (before.gpu_turns, after.gpu_turns),
        "progress": (before.progress, after.progress),
        "output": (before.output, after.output),
        "stages": (set(before.stages), set(after.stages)),
    }
    for key, (old, new) in pairs.items():
        if old != new:
            raise ConfigError(f"{key}: {remedy}")
    for name, stage in before.stages.items():
        fixed = {key: value for key, value in vars(stage).items() if key not in FREE}
        for key, value in fixed.items():
            if getattr(after.stages[name], key) != value:
                raise ConfigError(f"stages.{name}.{key}: {remedy}")
        if stage.torch_threads != after.stages[name].torch_threads:
            raise ConfigError(f"stages.{name}.num_cpus: with it the torch threads change; write num_threads as before")


def _scaled(config: Config, stage: str, replicas: int) -> Config:
    """Return a configuration with another number of a stage's replicas.

    Raises:
        ConfigError: it cannot have so many.
    """
    if stage not in config.stages:
        raise ConfigError(f"{stage}: no such stage; there are {', '.join(config.stages)}")
    settings = config.stages[stage]
    if stage in config.share_gpu or settings.groups:
        raise ConfigError(f"{stage}: stages with groups or a shared GPU keep their number; take down and up again")
    least, most = settings.min_replicas, settings.max_replicas
    if least is not None and most is not None and not least <= replicas <= most:
        raise ConfigError(f"{stage}: {replicas} is outside its bounds, {least} to {most}; `up` can change them")
    return _resized(config, stage, replicas)


def _changed(before: Config, after: Config) -> Config:
    """Return what a pipeline becomes by a new configuration: what the load has decided stays as far as it can.

    Raises:
        ConfigError: names the key that stands in the way.
    """
    check_change(before, after)
    for name, stage in after.stages.items():
        if stage.max_replicas is not None:
            after = _resized(after, name, max(stage.replicas, min(before.stages[name].replicas, stage.max_replicas)))
    return after


def _resized(config: Config, stage: str, replicas: int) -> Config:
    return replace(config, stages=config.stages | {stage: replace(config.stages[stage], replicas=replicas)})


def _room(config: Config) -> int:
    """Return how many requests the replicas that there are to be can hold."""
    return sum(REPLICA_WINDOW * stage.num_replicas for stage in config.stages.values())
