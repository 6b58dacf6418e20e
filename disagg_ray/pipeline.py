"""The driver: start stages, submit requests, collect results, close."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
import uuid
from collections.abc import Coroutine, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import ray
import torch

from disagg_ray.config import Config, load_config
from disagg_ray.errors import Cancelled, DisaggError
from disagg_ray.graph import FRAMES, build_graph
from disagg_ray.handoff import AttemptKey, Handoff
from disagg_ray.placement import Actor, Cluster, ask, gather_ready, launch
from disagg_ray.replica import Description, Health, ReplicaInfo, Reply, Task, driver_pool_bytes
from disagg_ray.request import Request, ResolvedRequest, resolve
from disagg_ray.result import Result, StageTiming
from disagg_ray.scheduler import StageQueue
from disagg_ray.stage import frames_in_piece
from disagg_ray.transfer.pool import Pool
from disagg_ray.video import to_array

logger = logging.getLogger("disagg_ray")

CLOSE_S = 5.0
"""How long closing waits for replicas to give their pools back before it kills them."""

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

    def cancel(self) -> bool:
        """Give the request up: it leaves the queue, or stops within one denoising step. False: it is finished."""
        return self._future.cancel()


@dataclass
class _Running:
    """What the driver remembers of one request in flight."""

    request: ResolvedRequest
    key: AttemptKey
    replies: dict[str, Reply] = field(default_factory=dict)
    holders: dict[str, Actor] = field(default_factory=dict)
    """By stage: the replica that holds slots for this request."""
    timings: list[StageTiming] = field(default_factory=list)


class Pipeline:
    """Stages on a Ray cluster, driven by an event loop in a thread of its own.

    Joins the Ray that is there, or starts one and shuts only that down again. Installs no signal handler.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.id = uuid.uuid4().hex[:8]
        self.replicas: tuple[ReplicaInfo, ...] = ()
        self._actors: dict[str, list[Actor]] = {}
        self._pool: Pool | None = None
        self._closed = False
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
        actors = launch(self.config, self.id)
        for actor in actors:
            self._actors.setdefault(actor.stage, []).append(actor)
        described: list[Description] = await gather_ready(self.config, actors, "describe")
        by_stage = {d.ports.stage: d.ports for d in described}
        self.graph = build_graph([by_stage[stage] for stage in self.config.stages])
        nbytes = driver_pool_bytes(self.config, self.graph, described[0].geometry)
        self._pool = Pool(f"driver-{self.id}", nbytes, ray.util.get_node_ip_address(), self.config.transport)
        self.replicas = tuple(await gather_ready(self.config, actors, "load", self.graph))
        logger.info("pipeline %s: %d replicas ready in %.1f s", self.id, len(actors), time.monotonic() - began)
        self._queues = {stage: StageQueue(len(replicas)) for stage, replicas in self._actors.items()}
        self._admitted = asyncio.Semaphore(self.config.max_in_flight)

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

    def submit(self, request: Request) -> Handle:
        """Check a request and queue it.

        Raises:
            RequestError: the request cannot be served by this model and configuration.
        """
        if self._closed:
            raise Cancelled("the pipeline is closed")
        resolved, images = resolve(request, self.config)
        pixels = {name: torch.from_numpy(to_array(image)) for name, image in images.items()}
        future = asyncio.run_coroutine_threadsafe(self._run(resolved, pixels), self._loop)
        return Handle(resolved, future)

    def health(self) -> dict[str, Health]:
        """Ask every replica how it is, by name."""
        actors = [actor for actors in self._actors.values() for actor in actors]

        async def ask_all() -> list[Health]:
            return list(await asyncio.gather(*(ask(actor, "health") for actor in actors)))

        return dict(zip([actor.name for actor in actors], self._call(ask_all()), strict=True))

    @property
    def driver_bytes_in_use(self) -> int:
        """Bytes of the driver's own pool that are taken."""
        return self._pool.bytes_in_use if self._pool is not None else 0

    async def _run(self, request: ResolvedRequest, images: dict[str, torch.Tensor]) -> Result:
        async with self._admitted:
            started = time.monotonic()
            running = _Running(request, AttemptKey(f"{request.id}.{uuid.uuid4().hex[:8]}", 0))
            try:
                given = await asyncio.to_thread(self._publish_images, running.key, images) if images else None
                stages: dict[str, asyncio.Task[None]] = {}
                async with asyncio.TaskGroup() as group:
                    for stage in self.graph.order:
                        before = [stages[producer] for producer in self.graph.producers(stage)]
                        stages[stage] = group.create_task(self._run_stage(running, stage, before, given))
                return await self._collect(running, started)
            except BaseExceptionGroup as errors:  # of the task group; the first one is what failed the request
                raise _first(errors) from None
            finally:
                self._release(running)

    async def _run_stage(
        self, running: _Running, stage: str, before: list[asyncio.Task[None]], images: Handoff | None
    ) -> None:
        """Run one stage of a request on some replica, once the stages it reads from are done."""
        for earlier in before:
            await asyncio.shield(earlier)
        began = time.monotonic()
        producers = self.graph.producers(stage)
        handoffs = [running.replies[producer].handoff for producer in producers]
        if images is not None and self.graph.image_inputs(stage):
            handoffs.append(images)
        task = Task(running.key, running.request, tuple(handoffs))
        async with self._queues[stage].take() as load:
            actor = running.holders[stage] = self._actors[stage][load.index]
            if load.turn.locked():
                await ask(actor, "prefetch", task, about=running.request.id)
            async with load.turn:
                reply: Reply = await ask(actor, "run", task, about=running.request.id)
        running.replies[stage] = reply
        running.timings.append(_timing(stage, actor.name, reply, time.monotonic() - began))
        logger.info("request %s: %s done in %.2f s", running.request.id, actor.name, reply.compute_s)
        for producer in producers:
            if all(consumer in running.replies for consumer in self.graph.consumers(producer)):
                self._release_stage(running, producer)

    def _publish_images(self, key: AttemptKey, images: dict[str, torch.Tensor]) -> Handoff:
        assert self._pool is not None
        self._pool.reserve(key, {name: image.nbytes for name, image in images.items()})
        return self._pool.publish(key, images)

    async def _collect(self, running: _Running, started: float) -> Result:
        reply = running.replies[self.graph.last]
        frames = await self._pull_frames(running, reply.num_frames) if reply.data is None else None
        order = {stage: place for place, stage in enumerate(self.graph.order)}
        timings = tuple(sorted(running.timings, key=lambda timing: order[timing.stage]))
        return Result(running.request, time.monotonic() - started, timings, reply.data, frames)

    async def _pull_frames(self, running: _Running, num_frames: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Bring raw frames here piece by piece, through one slot of the driver's pool."""
        request, actor = running.request, running.holders[self.graph.last]
        pixels = request.height * request.width
        frames = np.empty((num_frames, request.height, request.width, 3), np.float32)
        for start in range(0, num_frames, frames_in_piece(pixels, num_frames)):
            piece = await ask(actor, "piece", running.key, start, about=request.id)
            await asyncio.to_thread(self._pull_piece, running.key._replace(attempt=start), piece, frames[start:])
        return frames

    def _pull_piece(self, key: AttemptKey, piece: Handoff, into: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        assert self._pool is not None
        key = key._replace(request_id=f"{key.request_id}/piece")
        try:
            self._pool.reserve(key, {FRAMES: piece.nbytes})
            pulled = self._pool.pull(key, piece)[FRAMES]
            into[: len(pulled)] = pulled.numpy()
        finally:
            self._pool.release(key)

    def _release(self, running: _Running) -> None:
        for stage in list(running.holders):
            self._release_stage(running, stage)
        assert self._pool is not None
        self._pool.release(running.key)

    def _release_stage(self, running: _Running, stage: str) -> None:
        """Tell the replica that holds a stage's slots to free them; a dead one has none."""
        actor = running.holders.pop(stage, None)
        if actor is not None:
            actor.call("release", running.key, about=running.request.id)

    def close(self) -> None:
        """Cancel what runs, end the replicas, and shut down a Ray that this pipeline started. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._pool is not None:
            self._pool.close()
        if hasattr(self, "_cluster"):
            self._cluster.close()

    async def _stop(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        actors = [actor for actors in self._actors.values() for actor in actors]
        if actors and ray.is_initialized():
            closing = [asyncio.ensure_future(ask(actor, "close")) for actor in actors]
            await asyncio.wait(closing, timeout=CLOSE_S)
            for call, actor in zip(closing, actors, strict=True):
                call.cancel()
                ray.kill(actor.handle)
            await asyncio.gather(*closing, return_exceptions=True)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the pipeline's loop and wait for it here."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _timing(stage: str, replica: str, reply: Reply, elapsed: float) -> StageTiming:
    busy = reply.pull_s + reply.compute_s + reply.publish_s
    return StageTiming(
        stage, replica, max(0.0, elapsed - busy), reply.pull_s, reply.started, reply.compute_s,
        reply.publish_s, reply.pulled_bytes, reply.route, reply.peak_bytes,
    )  # fmt: skip


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
