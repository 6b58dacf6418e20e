"""Serves requests with a fleet of replicas: admits them, runs them, publishes their progress, counts them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from disagg_ray.config.schema import Config
from disagg_ray.driver.calls import Actor
from disagg_ray.driver.context import RunContext
from disagg_ray.driver.fleet import Fleet
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.metrics import Metrics, Outcome
from disagg_ray.driver.pool import DriverPool
from disagg_ray.driver.run import RequestRun
from disagg_ray.driver.tasks import BackgroundTasks
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import DisaggError, StageError, StartError
from disagg_ray.graph import build_graph
from disagg_ray.process import trim
from disagg_ray.progress.channel import Receiver
from disagg_ray.progress.events import Event
from disagg_ray.replica.messages import DriverInfo, Health
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import Result
from disagg_ray.scheduling.admission import Admission
from disagg_ray.scheduling.job import measure
from disagg_ray.transfer.sockets import filter_of

logger = logging.getLogger("disagg_ray")

REFRESH_S = 5.0
"""How often the metrics' gauges are set, which Ray forgets after 20 s, and free memory is returned."""
CANCEL_S = 5.0
"""How long stopping waits for requests that were cancelled."""


@dataclass(eq=False)
class _Submission:
    """A request from its submission to its end."""

    handle: Handle
    run: RequestRun | None = None
    """None: it waits for admission."""
    failure: DisaggError | None = None
    """Why the engine itself cancelled it."""


class Engine:
    """Lives on one event loop: `start` it, `run` requests, `stop` it; `close` it when the loop has ended."""

    def __init__(
        self,
        config: Config,
        id: str,
        admission: Admission,
        on_event: Callable[[Event], None],
        *,
        detached: bool,
    ) -> None:
        """Prepare an engine; `on_event` takes every event of every request, `detached` replicas outlive it."""
        self.id, self.admission = id, admission
        self.driver_epoch = uuid.uuid4().hex[:8]
        """Tells apart the engines that use the same replicas one after the other."""
        self.metrics = Metrics(config.model.path, config.stages)
        self.fleet = Fleet(
            config, id, self._lose_replica, self._forget, self._fail_all, self.metrics, detached=detached
        )  # fmt: skip
        self.driver_pool: DriverPool | None = None
        self.receiver: Receiver | None = None
        self.failure: DisaggError | None = None
        """Why no request can be served at present."""
        self.background = BackgroundTasks(self.metrics.task_restarted)
        self._on_event = on_event
        self._submissions: dict[asyncio.Task[Result], _Submission] = {}
        self._admitted: dict[str, _Submission] = {}
        """By request id, for events."""
        self._sequence = itertools.count()

    async def start(self) -> None:
        """Start the replicas and the driver's pool; return when all serve."""
        began, host, transport = time.monotonic(), ray.util.get_node_ip_address(), self.config.transport
        loop = asyncio.get_running_loop()

        def relay(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._handle_event, event)

        if self.config.progress:
            self.receiver = Receiver(host, relay, transport.ports, filter_of(transport.admit))
        described = await self.fleet.launcher.launch()
        ports = {description.ports.stage: description.ports for description in described}
        self.graph, self.geometry = build_graph([ports[stage] for stage in self.config.stages]), described[0].geometry
        taken = await self.fleet.launcher.known_sessions()
        pool = self.driver_pool = DriverPool(f"driver-{self.id}", self.config, self.graph, self.geometry, host, taken)
        credentials = self.receiver.credentials if self.receiver is not None else None
        info = DriverInfo(self.driver_epoch, pool.sessions, credentials)
        await self.fleet.load(self.graph, info, lambda: pool.known_sessions)
        self.background.start("count", self._refresh_metrics)
        logger.info("pipeline %s: %d replicas ready in %.1f s", self.id, len(described), time.monotonic() - began)

    async def run(
        self,
        handle: Handle,
        on_queued: Callable[[], None],
        *,
        images: Mapping[str, torch.Tensor],
        latents_file: Path | None,
        wait: bool,
        client: str = "",
    ) -> Result:
        """Queue a request, call `on_queued`, and compute it once it is admitted.

        Its task is named after it.

        Raises:
            Overloaded: the queue is full, and `wait` is False.
            DisaggError: what failed the request, or closed the engine.
        """
        request, sequence, task = handle.request, next(self._sequence), asyncio.current_task()
        assert task is not None
        task.set_name(f"request {request.id}")
        submission = self._submissions[task] = _Submission(handle)
        try:
            try:
                await self.admission.queue(handle, wait=wait)
                on_queued()
                ticket = await self.admission.enter(request.priority, sequence, client, lambda: self._predict(request))
            finally:
                self.admission.leave_queue(handle)
            try:
                return await self._compute(submission, images, latents_file)
            finally:
                self.admission.leave(ticket)
        except asyncio.CancelledError:
            if submission.failure is not None:
                raise submission.failure from None
            raise
        finally:
            del self._submissions[task]

    async def _compute(
        self, submission: _Submission, images: Mapping[str, torch.Tensor], latents_file: Path | None
    ) -> Result:
        """Run an admitted request; publish and count how it ended."""
        request, began = submission.handle.request, time.monotonic()
        entered = next(self._sequence)  # stages go by the order of admission: its fairness applies there too
        submission.run = RequestRun(self._context(), request, images, uuid.uuid4().hex[:8], entered, latents_file)
        self._admitted[request.id] = submission
        self.metrics.in_flight(self.num_admitted)
        outcome: Outcome = "failed"
        try:
            result = await self._run_in_time(submission.run)
            outcome = "done"
            return result
        except asyncio.CancelledError:
            outcome = "cancelled" if submission.failure is None else "failed"
            raise
        finally:
            self._publish(Event(request.id, "", "", 0, outcome))
            if self._admitted.get(request.id) is submission:
                del self._admitted[request.id]
            submission.run = None
            self.metrics.in_flight(self.num_admitted)
            self.metrics.request_finished(outcome, time.monotonic() - began)

    async def _run_in_time(self, run: RequestRun) -> Result:
        limit_s = self.config.failures.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await run.run()
        except TimeoutError:
            raise StageError(f"request {run.request.id}: not done within failures.timeout_s={limit_s:g} s") from None

    def _context(self) -> RunContext:
        assert self.driver_pool is not None, "the engine was not started"
        return RunContext(
            self.config, self.graph, self.geometry, self.fleet, self.driver_pool, self.metrics, self._publish,
            self.driver_epoch,
        )  # fmt: skip

    def _predict(self, request: ResolvedRequest) -> float:
        """Return the replica seconds that all stages are predicted to take with a request."""
        return sum(
            self.fleet.schedulers[stage].expect(*measure(request, settings.blocks))
            for stage, settings in self.config.stages.items()
        )

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.fleet.config

    @property
    def num_admitted(self) -> int:
        return sum(submission.run is not None for submission in self._submissions.values())

    @property
    def driver_bytes_in_use(self) -> int:
        """Bytes of the driver's own pool that requests take."""
        return self.driver_pool.bytes_in_use if self.driver_pool is not None else 0

    @property
    def queued(self) -> list[ResolvedRequest]:
        """Requests that wait for admission."""
        return [submission.handle.request for submission in self._submissions.values() if submission.run is None]

    def _handle_event(self, event: Event) -> None:
        """Publish a replica's event, unless it is of an attempt that is over."""
        submission = self._admitted.get(event.request_id)
        if submission is not None and submission.run is not None and submission.run.handle_event(event):
            self._publish(event)

    def _publish(self, event: Event) -> None:
        if (submission := self._admitted.get(event.request_id)) is not None:
            submission.handle.progress = event
        self._on_event(event)

    async def _refresh_metrics(self) -> None:
        assert self.driver_pool is not None
        while True:
            self.fleet.count()
            self.metrics.driver_pool(self.driver_pool.bytes_in_use, self.driver_pool.capacity)
            self.metrics.refresh()
            await off_loop(trim)
            await asyncio.sleep(REFRESH_S)

    def _lose_replica(self, actor: Actor) -> None:
        for submission in self._submissions.values():
            if submission.run is not None:
                submission.run.lose_replica(actor)

    def _forget(self, sessions: tuple[str, ...]) -> None:
        if self.driver_pool is not None:
            self.driver_pool.forget(sessions)

    def _fail_all(self, error: StartError | None) -> None:
        """Fail every request, as a stage has had no replica for too long; with None, serve requests again."""
        if error is None:
            if self.failure is not None:
                self.admission.reopen(self.failure)
            self.failure = None
            return
        self.failure = self.failure or error
        self.admission.close(self.failure)
        for task, submission in self._submissions.items():
            submission.failure = error
            task.cancel()

    async def health(self) -> dict[str, Health]:
        """Ask every replica for its health, by name; those that turn out to be lost are left out."""
        actors = self.fleet.actors
        answers = await asyncio.gather(*(self.fleet.ask(a, "health") for a in actors), return_exceptions=True)
        found = zip(actors, answers, strict=True)
        return {actor.name: answer for actor, answer in found if isinstance(answer, Health)}

    async def drain(self, grace_s: float) -> None:
        """Admit no more requests, give those admitted `grace_s` to finish, then cancel them."""
        self.admission.close()
        admitted = [task for task, submission in self._submissions.items() if submission.run is not None]
        for task in self._submissions.keys() - set(admitted):
            task.cancel()
        if admitted:
            _, late = await asyncio.wait(admitted, timeout=grace_s)
            for task in late:
                task.cancel()

    async def stop(self) -> None:
        """Cancel every request and end the replicas."""
        await self.background.close()
        self.admission.close()
        for task in self._submissions:
            task.cancel()
        if self._submissions:
            await asyncio.wait(self._submissions, timeout=CANCEL_S)  # one may still write its latents
        await self.fleet.close()

    def close(self) -> None:
        """Close the progress port and give the driver's memory back."""
        if self.receiver is not None:
            self.receiver.close()
        if self.driver_pool is not None:
            self.driver_pool.close()
