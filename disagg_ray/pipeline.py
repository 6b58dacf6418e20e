"""The driver: start stages, submit requests, collect results, close."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
import torch

from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.driver.calls import Actor
from disagg_ray.driver.cluster import Cluster
from disagg_ray.driver.context import RunContext
from disagg_ray.driver.fleet import Fleet
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.loop import Driver
from disagg_ray.driver.metrics import Metrics, Outcome
from disagg_ray.driver.pool import DriverPool
from disagg_ray.driver.run import RequestRun
from disagg_ray.driver.tasks import BackgroundTasks
from disagg_ray.driver.threads import off_loop, within
from disagg_ray.environment import trim
from disagg_ray.errors import ConfigError, DisaggError, StageError, StartError
from disagg_ray.graph import build_graph
from disagg_ray.media.video import to_array
from disagg_ray.models.prompts import check_prompts
from disagg_ray.progress.channel import Receiver
from disagg_ray.progress.events import Event
from disagg_ray.replica.messages import DriverInfo, Health, ReplicaInfo
from disagg_ray.request import Request, ResolvedRequest, resolve
from disagg_ray.result import Result
from disagg_ray.scheduling.admission import Admission
from disagg_ray.scheduling.work import measure
from disagg_ray.transfer.sockets import filter_of

logger = logging.getLogger("disagg_ray")

COUNT_S = 5.0
"""How often the metrics' gauges are set, which Ray forgets after 20 s, and free memory is given back."""


CLOSE_S = 5.0
"""How long closing waits for requests that were cancelled."""
STOP_S = 20.0
"""The same, for those and the replicas."""
SHUTDOWN_S = 15.0
"""The same, for Ray."""


class Pipeline(Driver):
    """Stages on a Ray cluster, driven by an event loop in a thread of its own.

    Joins the Ray that is there, or starts one and shuts only that down again. Installs no signal handler.
    """

    def __init__(
        self, config: Config, on_event: Callable[[Event], None] | None = None, pipeline_id: str | None = None
    ) -> None:
        """Start the pipeline; `on_event` hears of every request's progress, on a thread of its own."""
        self.check(config)
        super().__init__(pipeline_id or uuid.uuid4().hex[:8], on_event)
        self.config = config
        self.driver_epoch = uuid.uuid4().hex[:8]
        """Tells the pipelines apart that one after the other drive the same replicas."""
        self._journeys: dict[asyncio.Task[Result], RequestRun] = {}
        """Of admitted requests."""
        self._travelling: dict[str, tuple[RequestRun, Handle]] = {}
        """The same, by request id."""
        self._waiting: set[asyncio.Task[Result]] = set()
        """Of requests before the gate."""
        self._sequence = itertools.count()
        self._admission = Admission(config.limits.max_queued, config.max_in_flight)
        self._failure: DisaggError | None = None
        """Why nothing can be served."""
        self._failed: dict[asyncio.Task[Result], DisaggError] = {}
        """Requests that end for that reason."""
        self._fleet: Fleet | None = None
        self._driver_pool: DriverPool | None = None
        self._receiver: Receiver | None = None
        self._background = BackgroundTasks(self._count_restart)
        try:
            self._cluster = Cluster(config)
            if self._cluster.is_own and config.transport.admit == "auto":
                self.config = replace(config, transport=replace(config.transport, admit="host"))
            self._call(self._start())
        except BaseException:
            self.close()
            raise

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
                    f"a number here; only a pipeline that `disagg-ray up` puts up follows the load"
                )

    async def _start(self) -> None:
        began = time.monotonic()
        host = ray.util.get_node_ip_address()
        transport = self.config.transport
        if self.config.progress:
            self._receiver = Receiver(host, self._relay, transport.ports, filter_of(transport.admit))
        metrics = self._metrics = Metrics(self.config.model.path, self.config.stages)
        fleet = self._fleet = self._make_fleet(metrics)
        described = await fleet.launch()
        self.config = fleet.config
        ports = {description.ports.stage: description.ports for description in described}
        self.graph = build_graph([ports[stage] for stage in self.config.stages])
        geometry, taken = described[0].geometry, await fleet.met()
        driver_pool = self._driver_pool = DriverPool(
            f"driver-{self.id}", self.config, self.graph, geometry, host, taken
        )
        credentials = self._receiver.credentials if self._receiver is not None else None
        await fleet.load(
            self.graph, DriverInfo(self.driver_epoch, driver_pool.sessions, credentials), lambda: driver_pool.met
        )
        self._context = RunContext(
            self.config, self.graph, geometry, fleet, driver_pool, metrics, self._tell, self.driver_epoch
        )
        self._background.start("count", self._count)
        logger.info("pipeline %s: %d replicas ready in %.1f s", self.id, len(described), time.monotonic() - began)

    def _make_fleet(self, metrics: Metrics) -> Fleet:
        return Fleet(self.config, self.id, self._lose, self._fail, metrics)

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """Those that serve now."""
        return self._fleet.replicas if self._fleet is not None else ()

    @property
    def num_restarts(self) -> dict[str, int]:
        """How often a replica was replaced, by stage."""
        return dict(self._fleet.num_restarts) if self._fleet is not None else {}

    def submit(self, request: Request, *, wait: bool = True, latents_file: Path | None = None) -> Handle:
        """Check a request and queue it.

        While `limits.max_queued` requests wait to be started, it waits for room; without `wait` it raises.
        `latents_file` keeps the finished latents until the caller deletes it: a request that is submitted again, by
        another process too, goes on from there.

        Raises:
            RequestError: the request cannot be served by this model and configuration, or its id is in flight already.
            Overloaded: there is no room, and `wait` is False.
            Cancelled: the pipeline is closed or draining.
            StartError: a stage has no replica left.
        """
        resolved, images = resolve(request, self.config)
        check_prompts(resolved, self.config.model)
        pixels = {name: torch.from_numpy(to_array(image)) for name, image in images.items()}
        handle = Handle(resolved)
        return self._launch(handle, partial(self._run, handle, pixels, latents_file, wait=wait))

    async def _run(
        self,
        handle: Handle,
        images: dict[str, torch.Tensor],
        latents_file: Path | None,
        taken: Callable[[], None],
        *,
        wait: bool,
        driver: str = "",
    ) -> Result:
        request, sequence, task = handle.request, next(self._sequence), asyncio.current_task()
        assert task is not None
        task.set_name(f"request {request.id}")
        self._waiting.add(task)
        try:
            await self._admission.queue(handle, wait=wait)
            taken()
            given = await self._admission.enter(request.priority, sequence, driver, lambda: self._predict(request))
        except asyncio.CancelledError:
            if (failure := self._failed.pop(task, None)) is not None:
                raise failure from None
            raise
        finally:
            self._waiting.discard(task)
            self._admission.leave_queue(handle)
        entered = next(self._sequence)  # stages go by the order of admission: the gate's fairness holds there too
        journey = RequestRun(self._context, request, images, uuid.uuid4().hex[:8], entered, latents_file)
        self._journeys[task] = journey
        self._travelling[request.id] = journey, handle
        self._metrics.in_flight(len(self._journeys))
        began = time.monotonic()
        outcome: Outcome = "failed"
        try:
            result = await self._travel(journey)
            outcome = "done"
            return result
        except asyncio.CancelledError:
            if (failure := self._failed.pop(task, None)) is not None:
                raise failure from None
            outcome = "cancelled"
            raise
        finally:
            self._tell(Event(request.id, "", "", 0, outcome))
            del self._journeys[task]
            self._failed.pop(task, None)
            if self._travelling.get(request.id) == (journey, handle):
                del self._travelling[request.id]
            self._admission.leave(given)
            self._metrics.in_flight(len(self._journeys))
            self._metrics.request_finished(outcome, time.monotonic() - began)

    async def _travel(self, journey: RequestRun) -> Result:
        limit_s = self.config.failures.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await journey.run()
        except TimeoutError:
            raise StageError(
                f"request {journey.request.id}: not done within failures.timeout_s={limit_s:g} s"
            ) from None

    def _predict(self, request: ResolvedRequest) -> float:
        """Return the replica seconds that all stages are predicted to take with a request."""
        assert self._fleet is not None
        return sum(
            self._fleet.schedulers[stage].expect(*measure(request, settings.blocks))
            for stage, settings in self.config.stages.items()
        )

    def _relay(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._hear, event)

    def _hear(self, event: Event) -> None:
        """Pass on what a replica tells, unless it is over already."""
        journey, _ = self._travelling.get(event.request_id, (None, None))
        if journey is not None and journey.handle_event(event):
            self._tell(event)

    def _tell(self, event: Event) -> None:
        _, handle = self._travelling.get(event.request_id, (None, None))
        if handle is not None:
            handle.progress = event
        if self._listener is not None:
            self._listener.hear(event)

    def _count_restart(self, task: str) -> None:
        self._metrics.task_restarted(task)

    async def _count(self) -> None:
        """Keep the metrics' gauges fresh."""
        assert self._fleet is not None and self._driver_pool is not None
        while True:
            self._fleet.count()
            self._metrics.driver_pool(self._driver_pool.bytes_in_use, self._driver_pool.capacity)
            self._metrics.refresh()
            await off_loop(trim)
            await asyncio.sleep(COUNT_S)

    def note_written(self, seconds: float) -> None:
        """Have the metrics count what writing a result took."""
        self._loop.call_soon_threadsafe(self._metrics.written, seconds)

    def _lose(self, actor: Actor, info: ReplicaInfo) -> None:
        """A replica is gone."""
        if self._driver_pool is not None:
            self._driver_pool.forget(info.sessions)
        for journey in self._journeys.values():
            journey.lose_replica(actor)

    def _fail(self, error: StartError | None) -> None:
        """A stage has had no replica for too long: nothing can be served; or, with None, everything can again."""
        if error is None:
            if self._failure is not None:
                self._admission.reopen(self._failure)
            self._failure = None
            return
        self._failure = self._failure or error
        self._admission.close(self._failure)
        for task in [*self._waiting, *self._journeys]:
            self._failed[task] = error
            task.cancel()

    def health(self) -> dict[str, Health]:
        """Ask every replica how it is, by name; those that turn out to be lost are left out."""
        fleet = self._fleet
        assert fleet is not None

        async def ask_all() -> dict[str, Health]:
            actors = fleet.actors
            asked = (fleet.ask(actor, "health") for actor in actors)
            answers = zip(actors, await asyncio.gather(*asked, return_exceptions=True), strict=True)
            return {actor.name: answer for actor, answer in answers if isinstance(answer, Health)}

        return self._call(ask_all())

    @property
    def driver_bytes_in_use(self) -> int:
        """Bytes of the driver's own pool that requests take."""
        return self._driver_pool.bytes_in_use if self._driver_pool is not None else 0

    def drain(self, grace_s: float) -> None:
        """Admit nothing more, give what runs so many seconds, then cancel it. `close` comes after."""

        async def drain() -> None:
            self._admission.close()
            for task in self._waiting:
                task.cancel()
            if self._journeys:
                _, late = await asyncio.wait(self._journeys, timeout=grace_s)
                for task in late:
                    task.cancel()

        self._call(drain())

    def close(self) -> None:
        """Cancel what runs, end the replicas, and shut down a Ray that this pipeline started. Idempotent.

        Returns within two minutes whatever hangs; that is left behind, which is logged, and ends with the process.
        """
        if self._ended:
            return
        self._check_thread()
        if not self._wait_for_loop(self._stop(), STOP_S) and self._fleet is not None:
            within(CLOSE_S, self._fleet.kill, "killing the replicas")
        if self._receiver is not None:
            self._receiver.close()
        self._end_loop()
        if self._driver_pool is not None:
            self._driver_pool.close()
        if self._listener is not None:
            self._listener.close()
        if hasattr(self, "_cluster"):
            within(SHUTDOWN_S, self._cluster.close, "shutting Ray down")

    async def _stop(self) -> None:
        await self._background.close()
        self._admission.close()
        requests = [*self._waiting, *self._journeys]
        for task in requests:
            task.cancel()
        if requests:
            await asyncio.wait(requests, timeout=CLOSE_S)  # one may still write its latents
        if self._fleet is not None:
            await self._fleet.close()
