"""What a pipeline of one's own and a connection to a service have in common: requests in, results out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeAlias

from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import Handle, gather
from disagg_ray.driver.loop import LoopThread
from disagg_ray.driver.signals import Answer
from disagg_ray.errors import RequestError
from disagg_ray.progress.events import Event
from disagg_ray.progress.listener import Listener
from disagg_ray.replica.messages import ReplicaInfo
from disagg_ray.request import Request, ResolvedRequest
from disagg_ray.result import Result

Run: TypeAlias = Callable[[Handle, Callable[[], None]], Coroutine[Any, Any, Result]]
"""Computes a request, and calls its second argument once the request is queued."""


class PipelineApi(ABC):
    """Takes requests from any thread; `loop` runs them in a thread of its own."""

    def __init__(self, id: str, on_event: Callable[[Event], None] | None) -> None:
        self.id = id
        self.loop = LoopThread(id)
        self.listener = Listener(on_event) if on_event is not None else None
        """Calls `on_event`, on a thread of its own."""
        self._in_flight: dict[str, Handle] = {}
        """By request id: an id names one request at a time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    @abstractmethod
    def config(self) -> Config:
        """The configuration in force."""

    @abstractmethod
    def submit(self, request: Request, *, wait: bool = True, latents_file: Path | None = None) -> Handle:
        """Check a request and queue it."""

    @abstractmethod
    def close(self) -> None:
        """End. Idempotent."""

    @property
    @abstractmethod
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """Those that serve now."""

    @property
    def pools(self) -> dict[str, int]:
        """Bytes of each replica's pool, by replica."""
        return {replica.name: replica.pool_bytes for replica in self.replicas}

    @property
    def weights(self) -> dict[str, dict[str, int]]:
        """Bytes of each component, by replica."""
        return {replica.name: replica.weights for replica in self.replicas}

    @property
    def in_flight(self) -> tuple[Handle, ...]:
        """Handles of the requests that were submitted and are not done, those included that wait for room."""
        return tuple(self._in_flight.copy().values())

    def generate(self, request: Request) -> Result:
        """Generate one video and wait for it; an interrupt meanwhile, as by Ctrl-C, cancels the request.

        Raises:
            RequestError: the request cannot be served by this model and configuration.
            DisaggError: what failed it.
        """
        handle = self.submit(request)
        try:
            return handle.result()
        except BaseException:  # as KeyboardInterrupt: the caller gets no handle to cancel
            handle.cancel()
            raise

    def generate_all(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Generate many videos, yielding each as it finishes; requests are drawn as there is room.

        A request that fails does not stop the others: the first failure is raised once all others are done.
        """
        return gather(self.submit, requests, 2 * self.config.max_in_flight)

    def _launch(self, request: ResolvedRequest, run: Run) -> Handle:
        """Run a request on the loop and wait until it is queued; raise what kept it out of the queue."""
        handle = Handle(request, self.loop)
        queued: Answer[bool] = Answer()
        handle.future.add_done_callback(lambda _: queued.set_once(False))
        try:
            self.loop.check_thread()
            self.loop.start(handle.future, self._run_alone, handle, run, lambda: queued.set_once(True))
            if not queued.result():
                handle.result()
        except BaseException:  # as KeyboardInterrupt: the caller gets no handle to cancel
            handle.cancel()
            raise
        return handle

    async def _run_alone(self, handle: Handle, run: Run, queued: Callable[[], None]) -> Result:
        """Run a request unless another of its id is in flight: files, events and latents are known by it."""
        name = handle.request.id
        if name in self._in_flight and not self._in_flight[name].done():
            raise RequestError(f"id: {name!r} is in flight already; wait for it, cancel it, or give another id")
        self._in_flight[name] = handle
        try:
            return await run(handle, queued)
        finally:
            if self._in_flight.get(name) is handle:
                del self._in_flight[name]
