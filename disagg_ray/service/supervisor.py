"""The detached actor that owns a service and hands its work to many drivers.

A plain class, started by `stand`. Ray restarts it when it dies; it then adopts the replicas that live, and drivers
submit again what was not answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import ray
import torch

from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.tasks import BackgroundTasks
from disagg_ray.errors import Cancelled, DisaggError, Overloaded, RequestInFlight
from disagg_ray.models.identity import identify_request
from disagg_ray.progress.events import Event
from disagg_ray.replica.messages import Health
from disagg_ray.replica.software import software
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import Result
from disagg_ray.service.latents_store import LatentsStore
from disagg_ray.service.pipeline import ServicePipeline
from disagg_ray.service.protocol import Snapshot, SubmitMessage, UnknownRequest

logger = logging.getLogger("disagg_ray")

T = TypeVar("T")

MAX_STARTS = 3
MAX_EVENTS = 1_000
"""Of a driver that does not listen; older ones are dropped."""
MAX_GIVEN_UP = 1_000
"""Tickets that are remembered; nobody has more calls under way."""


@dataclass(eq=False)
class _Entry:
    asked: SubmitMessage
    handle: Handle
    setup: str
    """Of the pipeline when it was asked for (`identity.identify_setup`)."""
    tickets: set[str]
    """Of all that asked for this video: nobody else gets it, though it bears their request's id."""

    def answers(self, asked: SubmitMessage, setup: str) -> bool:
        """Return whether it makes the same video, and neither failed nor was given up."""
        future = self.handle.future
        lost = future.done() and (future.cancelled() or future.exception() is not None)
        return not lost and setup == self.setup and _video(self.asked.request) == _video(asked.request)

    def stands_in_the_way(self, asked: SubmitMessage) -> bool:
        """Return whether another connection waits for something else of this id."""
        return not self.handle.done() and self.asked.client != asked.client


def _video(request: ResolvedRequest) -> tuple[str, int, str]:
    """Return what tells a request's video from others of one setup."""
    return identify_request(request), request.fps, request.format


def _make_way(entry: _Entry, asked: SubmitMessage) -> None:
    """Give up what an id named before; a request that differs takes its place.

    Raises:
        RequestInFlight: another connection waits for that.
    """
    name = asked.request.id
    if entry.stands_in_the_way(asked):
        raise RequestInFlight(
            f"id: {name!r} is in flight under this run id, asked for by another client with another prompt, image or "
            f"other field, or before the configuration changed; wait for it, or give another id"
        )
    logger.info("request %s: asked for anew with other inputs, or after it failed; it is made again", name)
    entry.handle.cancel()


class _Client:
    """Whoever submits under one run id."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.tag = hashlib.sha256(run_id.encode()).hexdigest()[:8]
        """Tells its requests apart from others' of the same name."""
        self.entries: dict[str, _Entry] = {}
        """By request id, until the driver says that it has the answer."""
        self.given_up: deque[str] = deque(maxlen=MAX_GIVEN_UP)
        """Tickets of requests that were not here when the driver was done with them: they may be on their way."""
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.told = asyncio.Event()
        self.changed = asyncio.Condition()
        """Some entry is finished."""
        self.seen = time.monotonic()

    @property
    def num_unfinished(self) -> int:
        return sum(not entry.handle.done() for entry in self.entries.values())

    def cancel(self) -> None:
        for entry in self.entries.values():
            entry.handle.cancel()


class Supervisor:
    """Its methods run on the actor's event loop and return expected errors instead of raising them."""

    def __init__(self, name: str, config: Config) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self._name, self._config, self._began = name, config, time.time()
        self._keep = LatentsStore(name, config.service.latents_bytes, config.service.latents_expire_s)
        self._drivers: dict[str, _Client] = {}
        self._background = BackgroundTasks(self._count_restart)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starter = ThreadPoolExecutor(1, "disagg_ray-start")
        self._starting: Future[ServicePipeline] = self._starter.submit(self._start)

    def _start(self) -> ServicePipeline:
        for left in reversed(range(MAX_STARTS)):
            try:
                return ServicePipeline(self._config, self._name, self._relay)
            except DisaggError as error:
                if isinstance(error, ValueError) or not left:
                    raise
                logger.warning("pipeline %s did not start: %s", self._name, error)
        raise AssertionError("unreachable")

    async def _standing(self) -> ServicePipeline:
        self._loop = asyncio.get_running_loop()
        return await asyncio.shield(asyncio.wrap_future(self._starting))

    async def software(self) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        """Return what runs here, in plain types: a client of another version understands them too."""
        ours = software()
        return ours.folder, ours.digest, ours.versions

    async def ready(self) -> DisaggError | None:
        """Wait until every stage has its replicas."""
        try:
            await self._standing()
        except DisaggError as error:
            return error
        return None

    async def submit(self, run_id: str, asked: SubmitMessage, *, wait: bool) -> DisaggError | None:
        """Take a request on, or find that it is here already; wait for room, or answer `Overloaded`."""
        try:
            pipeline = await self._standing()
            if asked.keep:
                await asyncio.to_thread(self._keep.tidy)
            driver = self._driver(run_id)
            await self._make_room(driver, asked, pipeline.engine.config, wait=wait)
            if run_id not in self._drivers:
                return Cancelled(f"request {asked.request.id}: its driver {run_id} left, or was not heard of")
            driver = self._driver(run_id)  # it may have been away meanwhile
            if asked.ticket in driver.given_up:
                return Cancelled(f"request {asked.request.id} was given up before there was room for it")
            setup = pipeline.setup
            if (entry := driver.entries.get(asked.request.id)) is not None:
                if entry.answers(asked, setup):
                    entry.asked = asked
                    entry.tickets.add(asked.ticket)
                    return None
                _make_way(entry, asked)
            inner = replace(asked.request, id=f"{driver.tag}/{asked.request.id}")
            images = {name: torch.from_numpy(pixels.copy()) for name, pixels in asked.images.items()}
            latents = self._keep.file(run_id, asked.request.id) if asked.keep else None
            handle = pipeline.enqueue(inner, images, latents, run_id)
        except DisaggError as error:
            return error
        driver.entries[asked.request.id] = _Entry(asked, handle, setup, {asked.ticket})
        handle.add_done_callback(lambda _: self._soon(driver))
        return None

    async def _make_room(self, driver: _Client, asked: SubmitMessage, config: Config, *, wait: bool) -> None:
        limit = config.limits.max_queued
        async with driver.changed:
            if asked.request.id not in driver.entries and driver.num_unfinished >= limit and not wait:
                raise Overloaded(f"limits.max_queued: {limit} requests of this driver are here already; try later")
            await driver.changed.wait_for(
                lambda: asked.request.id in driver.entries or driver.num_unfinished < config.limits.max_queued
            )

    def _soon(self, driver: _Client) -> None:
        async def tell() -> None:
            async with driver.changed:
                driver.changed.notify_all()

        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(tell(), self._loop)

    async def result(self, run_id: str, request_id: str, ticket: str) -> Result | DisaggError:
        """Wait for a request that was submitted, unless another has taken its place since."""
        driver = self._drivers.get(run_id)
        entry = driver.entries.get(request_id) if driver is not None else None
        if entry is None or ticket not in entry.tickets:
            return UnknownRequest(f"request {request_id} is not here")
        try:
            result = await asyncio.shield(asyncio.wrap_future(entry.handle.future))
        except asyncio.CancelledError:
            if entry.handle.done():
                return Cancelled(f"request {request_id} was cancelled")
            raise
        except DisaggError as error:
            return error
        return replace(result, request=entry.asked.request)

    async def cancel(self, run_id: str, request_id: str, ticket: str) -> bool:
        """Cancel a request, unless it was submitted again since."""
        driver = self._drivers.get(run_id)
        entry = driver.entries.get(request_id) if driver is not None else None
        return entry is not None and entry.asked.ticket == ticket and entry.handle.cancel()

    async def listen(self, run_id: str, finished: list[tuple[str, str]]) -> list[Event]:
        """Hear that a driver lives and has these answers; return what became of its requests, after a while at most."""
        pipeline = await self._standing()
        driver, done = self._driver(run_id), list[str]()
        for request_id, ticket in finished:
            entry = driver.entries.get(request_id)
            if entry is not None and entry.asked.ticket != ticket:
                continue  # it was submitted again since
            if entry is None:
                driver.given_up.append(ticket)
            else:
                del driver.entries[request_id]
                entry.handle.cancel()  # it may have been given up before it was taken on
            done.append(request_id)
        if done:
            await asyncio.to_thread(self._keep.drop, run_id, done)
        try:
            async with asyncio.timeout(pipeline.engine.config.service.client_timeout_s / 4):
                await driver.told.wait()
        except TimeoutError:
            return []
        driver.told.clear()
        events = list(driver.events)
        driver.events.clear()
        return events

    async def leave(self, run_id: str) -> None:
        """Hear that a driver ends: what it has not got is cancelled."""
        if (driver := self._drivers.pop(run_id, None)) is not None:
            driver.cancel()

    def _driver(self, run_id: str) -> _Client:
        if run_id not in self._drivers:
            driver = self._drivers[run_id] = _Client(run_id)
            self._background.start("supervisor_watch", self._watch, driver)
        self._drivers[run_id].seen = time.monotonic()
        return self._drivers[run_id]

    def _count_restart(self, name: str) -> None:
        if self._starting.done() and self._starting.exception() is None:
            self._starting.result().note_restart(name)

    async def _watch(self, driver: _Client) -> None:
        """Cancel what a driver asked for once it has not been heard of for `service.client_timeout_s`."""
        timeout_s = (await self._standing()).engine.config.service.client_timeout_s
        while (left := driver.seen + timeout_s - time.monotonic()) > 0:
            await asyncio.sleep(left)
        if self._drivers.get(driver.run_id) is driver:
            logger.warning(
                "driver %s was not heard of for %g s: %d requests are cancelled",
                driver.run_id, timeout_s, driver.num_unfinished,
            )  # fmt: skip
            await self.leave(driver.run_id)

    def _relay(self, event: Event) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._hear, event)

    def _hear(self, event: Event) -> None:
        tag, _, request_id = event.request_id.partition("/")
        for driver in self._drivers.values():
            if driver.tag == tag:
                driver.events.append(replace(event, request_id=request_id))
                driver.told.set()

    async def snapshot(self) -> Snapshot:
        """Say how the pipeline is; answers while it starts too."""
        node, pid = ray.util.get_node_ip_address(), os.getpid()
        drivers = {driver.run_id: driver.num_unfinished for driver in self._drivers.values()}
        about = Snapshot(self._name, "starting", self._config, self._began, node, pid, drivers)
        if not self._starting.done():
            return about
        if (error := self._starting.exception()) is not None:
            return replace(about, state=f"failed: {error}")
        pipeline = await self._standing()
        queued, stages = await asyncio.to_thread(pipeline.survey)
        engine, fleet = pipeline.engine, pipeline.fleet
        state = f"failed: {engine.failure}" if engine.failure else "ready"
        return replace(
            about, state=state, config=engine.config, queued=queued, stages=stages, replicas=fleet.replicas,
            num_restarts=dict(fleet.num_restarts), rollout=fleet.rollout,
            driver_bytes_in_use=engine.driver_bytes_in_use,
        )  # fmt: skip

    async def health(self) -> dict[str, Health]:
        return await asyncio.to_thread((await self._standing()).host.health)

    async def scale(self, stage: str, replicas: int) -> DisaggError | None:
        try:
            await asyncio.wrap_future((await self._standing()).scale(stage, replicas))
        except DisaggError as error:
            return error
        return None

    async def change(self, config: Config) -> DisaggError | None:
        """Become what a configuration says; answers when all that it asks for serve, or with why it stays as it was."""
        try:
            await asyncio.wrap_future((await self._standing()).change(config))
        except DisaggError as error:
            return error
        return None

    async def end(self, grace_s: float) -> None:
        """Give what runs so many seconds, then end the replicas and leave nothing behind."""
        if self._starting.done() and self._starting.exception() is None:
            pipeline = await self._standing()
            await asyncio.to_thread(pipeline.host.drain, grace_s)
            await asyncio.to_thread(pipeline.host.close)
        await asyncio.to_thread(self._keep.clear)
