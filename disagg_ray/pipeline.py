"""The driver: start stages, submit requests, collect results, close."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ray
import torch

from disagg_ray.config import Config, load_config
from disagg_ray.errors import Cancelled, DisaggError, Overloaded, StageError, StartError
from disagg_ray.fleet import Fleet
from disagg_ray.graph import build_graph
from disagg_ray.holdings import Holdings
from disagg_ray.journey import Crew, Journey
from disagg_ray.placement import Actor, Cluster
from disagg_ray.queues import PriorityQueue
from disagg_ray.replica import Health, ReplicaInfo
from disagg_ray.request import Request, ResolvedRequest, resolve
from disagg_ray.result import Result
from disagg_ray.video import to_array

logger = logging.getLogger("disagg_ray")

T = TypeVar("T")


class Handle:
    """A submitted request: wait for it with `result`, `await` it, or `cancel` it."""

    def __init__(self, request: ResolvedRequest, future: concurrent.futures.Future[Result]) -> None:
        self.request = request
        self._future = future

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the video.

        Raises:
            TimeoutError: not finished within `timeout_s`; the request goes on.
            Cancelled: it was cancelled, or the pipeline closed.
            DisaggError: what failed it.
        """
        try:
            return self._future.result(timeout_s)
        except concurrent.futures.CancelledError:
            raise Cancelled(f"request {self.request.id} was cancelled") from None

    def __await__(self) -> Generator[Any, None, Result]:
        return asyncio.wrap_future(self._future).__await__()

    def done(self) -> bool:
        return self._future.done()

    def add_done_callback(self, call: Callable[[Handle], None]) -> None:
        """Have `call` called with this handle when the request is finished, failed or cancelled, in some thread."""
        self._future.add_done_callback(lambda _: call(self))

    def cancel(self) -> bool:
        """Give the request up: it leaves the queue, or stops within one denoising step. False: it is finished."""
        return self._future.cancel()


class Gate:
    """Lets so many requests in at once; the others wait by priority."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._waiting: PriorityQueue[asyncio.Future[None]] = PriorityQueue()

    async def enter(self, priority: int, sequence: int) -> None:
        if self._room:
            self._room -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.push(turn, priority, sequence)
        try:
            await turn
        except asyncio.CancelledError:
            if not self._waiting.remove(turn):
                self.leave()  # it was let in at the same moment
            raise

    def leave(self) -> None:
        if self._waiting:
            self._waiting.pop().set_result(None)
        else:
            self._room += 1


class Pipeline:
    """Stages on a Ray cluster, driven by an event loop in a thread of its own.

    Joins the Ray that is there, or starts one and shuts only that down again. Installs no signal handler.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.id = uuid.uuid4().hex[:8]
        self._journeys: dict[asyncio.Task[Result], Journey] = {}
        """Of admitted requests."""
        self._waiting: set[asyncio.Task[Result]] = set()
        """Requests before the gate."""
        self._sequence = itertools.count()
        self._room = threading.Condition()
        self._queued: set[object] = set()
        """Tickets of requests before the gate."""
        self._failure: DisaggError | None = None
        """Why nothing can be served any more."""
        self._closed = False
        self._fleet: Fleet | None = None
        self._holdings: Holdings | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"disagg_ray-{self.id}", daemon=True)
        self._thread.start()
        try:
            self._cluster = Cluster(config)
            self._call(self._start())
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_config(cls, path: str | Path, *overrides: str) -> Pipeline:
        """Start the pipeline a YAML file describes; overrides are dotted, as `stages.transformer.replicas=2`.

        Raises:
            ConfigError: the configuration cannot work.
            CheckpointError: the model cannot be loaded.
            StartError: the stages did not become ready.
        """
        return cls(load_config(path, *overrides))

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _start(self) -> None:
        began = time.monotonic()
        fleet = self._fleet = Fleet(self.config, self.id, self._lose, self._fail)
        described = await fleet.launch()
        ports = {description.ports.stage: description.ports for description in described}
        self.graph = build_graph([ports[stage] for stage in self.config.stages])
        self._holdings = Holdings(
            f"driver-{self.id}", self.config, self.graph, described[0].geometry, ray.util.get_node_ip_address()
        )
        await fleet.load(self.graph)
        self._crew = Crew(self.config, self.graph, fleet, self._holdings)
        self._gate = Gate(self.config.max_in_flight)
        logger.info("pipeline %s: %d replicas ready in %.1f s", self.id, len(described), time.monotonic() - began)

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """Those that serve now."""
        return self._fleet.replicas if self._fleet is not None else ()

    @property
    def num_restarts(self) -> dict[str, int]:
        """How often a replica was replaced, by stage."""
        return dict(self._fleet.num_restarts) if self._fleet is not None else {}

    @property
    def pools(self) -> dict[str, int]:
        """Bytes of each replica's pool, by replica."""
        return {replica.name: replica.pool_bytes for replica in self.replicas}

    @property
    def weights(self) -> dict[str, dict[str, int]]:
        """Bytes of each component, by replica."""
        return {replica.name: replica.weights for replica in self.replicas}

    def generate(self, request: Request) -> Result:
        """Generate one video and wait for it.

        Raises:
            RequestError: the request cannot be served by this model and configuration.
            DisaggError: what failed it.
        """
        return self.submit(request).result()

    def generate_all(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Generate many videos, yielding each as it finishes; requests are drawn as there is room.

        A request that fails does not stop the others: the first failure is raised once all others are done.
        """
        pending: set[concurrent.futures.Future[Result]] = set()
        failures: list[DisaggError] = []
        left = iter(requests)
        try:
            while True:
                while len(pending) < 2 * self.config.max_in_flight and (request := next(left, None)) is not None:
                    try:
                        pending.add(self.submit(request)._future)
                    except DisaggError as error:
                        failures.append(error)
                if not pending:
                    break
                done, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    failure = future.exception()
                    if isinstance(failure, DisaggError):
                        failures.append(failure)
                    else:
                        yield future.result()
        finally:
            for future in pending:
                future.cancel()
        if failures:
            for other in failures[1:]:
                failures[0].add_note(f"another request failed too: {other}")
            raise failures[0]

    def submit(self, request: Request, *, wait: bool = True, latents_file: Path | None = None) -> Handle:
        """Check a request and queue it.

        While `limits.max_queued` requests wait to be started, it waits for room; without `wait` it raises.
        `latents_file` keeps the finished latents until the caller deletes it: a request that is submitted again, by
        another process too, goes on from there.

        Raises:
            RequestError: the request cannot be served by this model and configuration.
            Overloaded: there is no room, and `wait` is False.
            Cancelled: the pipeline is closed or draining.
            StartError: a stage has no replica left.
        """
        resolved, images = resolve(request, self.config)
        pixels = {name: torch.from_numpy(to_array(image)) for name, image in images.items()}
        ticket = self._queue(wait=wait)
        future = asyncio.run_coroutine_threadsafe(self._run(resolved, pixels, latents_file, ticket), self._loop)
        future.add_done_callback(lambda _: self._unqueue(ticket))  # it may be cancelled before it begins
        return Handle(resolved, future)

    def _queue(self, *, wait: bool) -> object:
        """Take one of the places in the queue."""
        limit = self.config.limits.max_queued
        with self._room:
            if len(self._queued) >= limit and not wait and not self._closed:
                raise Overloaded(f"limits.max_queued: {limit} requests wait already; try again later, or wait")
            self._room.wait_for(lambda: self._closed or self._failure or len(self._queued) < limit)
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise Cancelled("the pipeline is closed")
            ticket = object()
            self._queued.add(ticket)
            return ticket

    def _unqueue(self, ticket: object) -> None:
        with self._room:
            self._queued.discard(ticket)
            self._room.notify()

    async def _run(
        self, request: ResolvedRequest, images: dict[str, torch.Tensor], latents_file: Path | None, ticket: object
    ) -> Result:
        sequence, task = next(self._sequence), asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            await self._gate.enter(request.priority, sequence)
        finally:
            self._waiting.discard(task)
            self._unqueue(ticket)
        journey = Journey(self._crew, request, images, uuid.uuid4().hex[:8], sequence, latents_file)
        self._journeys[task] = journey
        limit_s = self.config.failures.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await journey.travel()
        except TimeoutError:
            raise StageError(f"request {request.id}: not done within failures.timeout_s={limit_s:g} s") from None
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            del self._journeys[task]
            self._gate.leave()

    def _lose(self, actor: Actor, info: ReplicaInfo) -> None:
        """A replica is gone."""
        if self._holdings is not None:
            self._holdings.forget(info.sessions)
        for journey in self._journeys.values():
            journey.lose(actor)

    def _fail(self, error: StartError) -> None:
        """A stage has no replica left: nothing can be served any more."""
        with self._room:
            self._failure = error
            self._room.notify_all()
        for task in [*self._waiting, *self._journeys]:
            task.cancel()

    def health(self) -> dict[str, Health]:
        """Ask every replica how it is, by name."""
        fleet = self._fleet
        assert fleet is not None

        async def ask_all() -> dict[str, Health]:
            actors = fleet.actors
            healths = await asyncio.gather(*(fleet.ask(actor, "health") for actor in actors))
            return dict(zip([actor.name for actor in actors], healths, strict=True))

        return self._call(ask_all())

    @property
    def driver_bytes_in_use(self) -> int:
        """Bytes of the driver's own pool that requests take."""
        return self._holdings.bytes_in_use if self._holdings is not None else 0

    def drain(self, grace_s: float) -> None:
        """Admit nothing more, give what runs so many seconds, then cancel it. `close` comes after."""

        async def drain() -> None:
            for task in self._waiting:
                task.cancel()
            if self._journeys:
                _, late = await asyncio.wait(self._journeys, timeout=grace_s)
                for task in late:
                    task.cancel()

        self._end_admission()
        self._call(drain())

    def close(self) -> None:
        """Cancel what runs, end the replicas, and shut down a Ray that this pipeline started. Idempotent."""
        if self._loop.is_closed():
            return
        self._end_admission()
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._holdings is not None:
            self._holdings.close()
        if hasattr(self, "_cluster"):
            self._cluster.close()

    def _end_admission(self) -> None:
        with self._room:
            self._closed = True
            self._room.notify_all()

    async def _stop(self) -> None:
        requests = [*self._waiting, *self._journeys]
        for task in requests:
            task.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        if self._fleet is not None:
            await self._fleet.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the pipeline's loop and wait for it here."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
