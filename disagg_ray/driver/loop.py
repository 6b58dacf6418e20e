"""What a pipeline of one's own and a connection to one that stands share: a loop in a thread, and calls that wait."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import NOT_HERE, Handle, gather
from disagg_ray.driver.signals import Latch, take
from disagg_ray.errors import Cancelled, RequestError
from disagg_ray.progress.channel import Listener
from disagg_ray.progress.events import Event
from disagg_ray.replica.messages import Health, ReplicaInfo
from disagg_ray.request import Request
from disagg_ray.result import Result

T = TypeVar("T")
Run: TypeAlias = Callable[[Callable[[], None]], Coroutine[Any, Any, Result]]
"""Runs a request, and calls what it is given once that is taken on."""

logger = logging.getLogger("disagg_ray")

CLOSE_S = 5.0
"""How long closing waits for the event loop, again and again: for what runs there to be cancelled, and for its end."""


class Driver(ABC):
    """Takes requests from any thread; what it does with them runs on an event loop in a thread of its own."""

    config: Config

    def __init__(self, id: str, on_event: Callable[[Event], None] | None) -> None:
        self.id = id
        self._listener = Listener(on_event) if on_event is not None else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=f"disagg_ray-{id}", daemon=True)
        self._calls: dict[asyncio.Task[Any], Future[Any]] = {}
        """What runs, and where the answer goes."""
        self._unbegun: dict[Future[Any], Coroutine[Any, Any, Any]] = {}
        """What the loop has not taken up yet, by where the answer goes."""
        self._in_flight: dict[str, Handle] = {}
        """By request id: an id names one request at a time."""
        self._ending = self._ended = False
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

    @abstractmethod
    def health(self) -> dict[str, Health]:
        """Ask every replica how it is, by name; those that turn out to be lost are left out."""

    @property
    @abstractmethod
    def driver_bytes_in_use(self) -> int:
        """Bytes that requests take of the pool where the driver of the replicas holds tensors."""

    @property
    def pools(self) -> dict[str, int]:
        """Bytes of each replica's pool, by replica."""
        return {replica.name: replica.pool_bytes for replica in self.replicas}

    @property
    def weights(self) -> dict[str, dict[str, int]]:
        """Bytes of each component, by replica."""
        return {replica.name: replica.weights for replica in self.replicas}

    def generate(self, request: Request) -> Result:
        """Generate one video and wait for it; whoever is interrupted meanwhile, as by Ctrl-C, gives it up.

        Raises:
            RequestError: the request cannot be served by this model and configuration.
            DisaggError: what failed it.
        """
        handle = self.submit(request)
        try:
            return handle.result()
        except BaseException:  # as KeyboardInterrupt: nobody will have the handle
            handle.cancel()
            raise

    def generate_all(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Generate many videos, yielding each as it finishes; requests are drawn as there is room.

        A request that fails does not stop the others: the first failure is raised once all others are done.
        """
        return gather(self.submit, requests, 2 * self.config.max_in_flight)

    def _check_thread(self) -> None:
        """Refuse to wait on the loop's own thread, where a done callback may run: that would never end.

        Raises:
            RuntimeError: this is that thread.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(NOT_HERE)

    def _call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = math.inf) -> T:
        """Run a coroutine on the loop and wait for it here.

        Raises:
            TimeoutError: it was not done in time; it is cancelled.
        """
        answer, done = Future[T](), Latch()
        answer.add_done_callback(done.set)
        try:
            self._check_thread()
        except RuntimeError:
            coroutine.close()
            raise
        self._run_into(answer, coroutine)
        try:
            if not done.wait(timeout_s):
                raise TimeoutError(f"{self.id}: no answer of its event loop within {timeout_s:g} s")
            return answer.result()
        except CancelledError:
            raise Cancelled(f"{self.id} was closed meanwhile") from None
        except BaseException:
            answer.cancel()
            raise

    def _launch(self, handle: Handle, run: Run) -> Handle:
        """Run a request on the loop and wait until it is taken on, which `run` is to tell; raise what kept it out."""
        told: SimpleQueue[object] = SimpleQueue()
        handle._future.add_done_callback(told.put)
        handle._thread = self._thread
        try:
            self._check_thread()
            self._run_into(handle._future, self._run_alone(handle, run, lambda: told.put(None)))
            if take(told) is not None:
                handle.result()
        except BaseException:  # as KeyboardInterrupt: nobody will have the handle
            handle.cancel()
            raise
        return handle

    async def _run_alone(self, handle: Handle, run: Run, taken: Callable[[], None]) -> Result:
        """Run a request unless another of its id is in flight: files, events and latents are known by it."""
        name = handle.request.id
        if name in self._in_flight and not self._in_flight[name].done():
            raise RequestError(f"id: {name!r} is in flight already; wait for it, cancel it, or give another id")
        self._in_flight[name] = handle
        try:
            return await run(taken)
        finally:
            if self._in_flight.get(name) is handle:
                del self._in_flight[name]

    def _run_into(self, answer: Future[T], coroutine: Coroutine[Any, Any, T]) -> None:
        """Run a coroutine on the loop; what comes of it goes to `answer`, and who cancels that cancels it.

        As `asyncio.run_coroutine_threadsafe`, but for a future that is made, and watched, before the loop knows it:
        from then on the caller need not take its lock (`signals` says why).

        Raises:
            Cancelled: the loop has ended; one that ends before the coroutine cancels `answer`.
        """

        def start() -> None:
            if self._ending:
                return
            task = self._loop.create_task(self._unbegun.pop(answer))
            self._calls[task] = answer
            task.add_done_callback(self._calls.pop)
            task.add_done_callback(partial(_settle, answer))
            answer.add_done_callback(partial(self._soon, task.cancel))

        self._unbegun[answer] = coroutine
        try:
            if self._ended:  # or it hangs
                raise RuntimeError
            self._loop.call_soon_threadsafe(start)
        except RuntimeError:
            self._unbegun.pop(answer).close()
            raise Cancelled(f"{self.id} is closed") from None

    def _soon(self, call: Callable[[], object], _: object = None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call)

    def _run_loop(self) -> None:
        self._loop.run_forever()
        if left := asyncio.all_tasks(self._loop):  # it was left behind, and goes on after all
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(left, timeout=CLOSE_S))
        self._loop.close()

    def _end_loop(self) -> None:
        """End the loop; whoever still waits for an answer gets `Cancelled`. A loop that hangs is left behind."""

        async def cancel_others() -> None:
            self._ending = True
            others = [task for task in self._calls if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=CLOSE_S)

        self._wait_for_loop(cancel_others(), 2 * CLOSE_S)
        self._ending = self._ended = True
        self._soon(self._loop.stop)
        self._thread.join(2 * CLOSE_S)
        for answer, coroutine in list(self._unbegun.items()):
            coroutine.close()
            answer.cancel()
        for answer in list(self._calls.values()):  # what would not end
            answer.cancel()

    def _wait_for_loop(self, coroutine: Coroutine[Any, Any, None], timeout_s: float) -> bool:
        """Run a coroutine that closing needs; False: it hangs and is left behind, which is logged."""
        try:
            self._call(coroutine, timeout_s)
        except TimeoutError:
            logger.warning("%s: its event loop has hung for %g s: left behind", self.id, timeout_s)
            return False
        return True


def _settle(answer: Future[T], task: asyncio.Task[T]) -> None:
    """Have a future say what came of a task."""
    if task.cancelled():
        answer.cancel()
    if not answer.set_running_or_notify_cancel():
        return
    if (error := task.exception()) is not None:
        answer.set_exception(error)
    else:
        answer.set_result(task.result())
