"""What the supervisor drives: an engine whose replicas outlive it, and which changes while it serves."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch

from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.host import EngineHost
from disagg_ray.driver.loop import LoopThread
from disagg_ray.driver.metrics import Reason
from disagg_ray.driver.placement import room_for
from disagg_ray.driver.threads import off_loop
from disagg_ray.models.identity import identify_setup
from disagg_ray.progress.events import Event
from disagg_ray.progress.listener import Listener
from disagg_ray.replica.sizing import most_in_flight
from disagg_ray.request import ResolvedRequest
from disagg_ray.scheduling.admission import Admission
from disagg_ray.scheduling.job import measure
from disagg_ray.service.autoscale import Load, Scaler
from disagg_ray.service.changes import changed, resized, scaled
from disagg_ray.service.protocol import StageState
from disagg_ray.service.rollout import Rollouts

logger = logging.getLogger("disagg_ray")

DECIDE_S = 1.0
"""How often the load decides the number of replicas."""


class ServicePipeline:
    """Serves the requests of many clients; `loop` runs the engine in a thread of its own."""

    def __init__(self, config: Config, name: str, on_event: Callable[[Event], None]) -> None:
        """Adopt the replicas of service `name` that live, and start those that are missing."""
        self.loop = LoopThread(name)
        self._changing = asyncio.Lock()
        admission = Admission(sys.maxsize, 0)  # the supervisor bounds how many requests of a client wait
        self.host = EngineHost(config, name, admission, self.loop, Listener(on_event), detached=True)
        self.engine, self.fleet = self.host.engine, self.host.engine.fleet
        self.rollouts = Rollouts(self.fleet)
        try:
            self.setup = identify_setup(self.engine.config)
            """Digest of all that besides their requests decides the videos."""
            self.loop.call(self._admit)
        except BaseException:
            self.host.close()
            raise

    async def _admit(self) -> None:
        self._resize_admission()
        self.engine.background.start("settle", self.rollouts.settle)
        self.engine.background.start("scale", self._scale)

    def enqueue(
        self, request: ResolvedRequest, images: dict[str, torch.Tensor], latents_file: Path | None, client: str
    ) -> Handle:
        """Queue a request of a client; never waits."""
        handle = Handle(request, self.loop)
        run = partial(self.engine.run, images=images, latents_file=latents_file, wait=False, client=client)
        self.loop.start(handle.future, run, handle, lambda: None)
        return handle

    def scale(self, stage: str, replicas: int) -> Future[None]:
        """Give a stage another number of replicas; the future fails with a ConfigError where that is invalid."""
        return self._start(partial(scaled, stage=stage, replicas=replicas), "asked", f"{replicas} were asked for")

    def change(self, config: Config) -> Future[None]:
        """Change to another configuration, replica by replica, losing no request; done when all replicas serve.

        The future fails, and all stays as it was, with a ConfigError where the new configuration has another graph,
        model or size of a pool, and with a DisaggError where a replica does not start.
        """
        return self._start(partial(changed, after=config), "config", "a new configuration was given")

    def _start(self, make: Callable[[Config], Config], reason: Reason, detail: str) -> Future[None]:
        answer: Future[None] = Future()
        self.loop.start(answer, self._change, make, reason, detail)
        return answer

    async def _change(self, make: Callable[[Config], Config], reason: Reason, detail: str) -> None:
        """Change to what `make` returns for the configuration in force; one change at a time, so that none is lost."""
        async with self._changing:
            before = self.engine.config
            config = make(before)
            await (self.rollouts.roll_out if reason == "config" else self.fleet.resize)(config)
            for stage, settings in config.stages.items():
                old, new = before.stages[stage].num_replicas, settings.num_replicas
                if old != new:
                    logger.info("%s scales from %d to %d replicas: %s", stage, old, new, detail)
                    self.engine.metrics.scaled(stage, old, new, reason)
            if reason == "config":
                self.setup = await asyncio.to_thread(identify_setup, config)
            self._resize_admission()

    def _resize_admission(self) -> None:
        """Admit what the replicas that serve now can hold."""
        self.engine.admission.resize(most_in_flight(self.engine.config, self.engine.graph, self.fleet.replicas))

    async def _scale(self) -> None:
        """Let the load decide the number of replicas of stages whose configuration gives bounds."""
        settings = self.engine.config.service
        scaler = Scaler(settings)
        while True:
            await asyncio.sleep(DECIDE_S)
            self._resize_admission()  # replicas come and go
            if settings != self.engine.config.service:
                settings = self.engine.config.service
                scaler = Scaler(settings)
            for stage, limits in self.engine.config.stages.items():
                if limits.max_replicas is None or limits.min_replicas is None:
                    continue
                if self._changing.locked():  # what is decided now would be for an outdated configuration
                    break
                decision = scaler.decide(stage, await self._load_of(stage), time.monotonic())
                if decision is not None:
                    make = partial(resized, stage=stage, replicas=decision.replicas)
                    await self._change(make, decision.reason, decision.detail)

    async def _load_of(self, stage: str) -> Load:
        room = await off_loop(room_for, self.engine.config, stage)
        settings, scheduler = self.engine.config.stages[stage], self.fleet.schedulers[stage]
        queued_s = sum(scheduler.expect(*measure(request, settings.blocks)) for request in self.engine.queued)
        return Load(
            least=settings.min_replicas or settings.replicas,
            most=settings.most_replicas,
            wanted=settings.replicas,
            ready=len(scheduler.replicas),
            starting=self.fleet.launcher.num_starting(stage),
            busy=scheduler.num_running,
            outstanding_s=scheduler.outstanding_seconds(time.monotonic()) + queued_s,
            room=room,
        )

    def note_restart(self, name: str) -> None:
        """Have the metrics count a background task of the supervisor that was started again."""
        self.loop.call_soon(self.engine.metrics.task_restarted, name)

    def survey(self) -> tuple[int, tuple[StageState, ...]]:
        """Return how many requests wait to be admitted, and the state of each stage."""

        async def look() -> tuple[int, tuple[StageState, ...]]:
            return len(self.engine.queued), tuple(self._state(stage) for stage in self.engine.config.stages)

        return self.loop.call(look)

    def _state(self, stage: str) -> StageState:
        settings, scheduler = self.engine.config.stages[stage], self.fleet.schedulers[stage]
        names = {info.name for info in self.fleet.replicas if info.stage == stage}
        gpu_bytes = sum(self.fleet.healths[name].gpu_allocated_bytes for name in names & set(self.fleet.healths))
        numbers = settings.num_replicas, len(scheduler.replicas), scheduler.num_running, scheduler.num_waiting
        return StageState(stage, *numbers, gpu_bytes)
