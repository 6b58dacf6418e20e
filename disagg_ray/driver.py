"""What a pipeline of one's own and a connection to one that stands share: a loop in a thread, and calls that wait."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from disagg_ray.config import Config
from disagg_ray.handle import Handle, gather
from disagg_ray.messages import Health, ReplicaInfo
from disagg_ray.progress import Event, Listener
from disagg_ray.request import Request
from disagg_ray.result import Result
from disagg_ray.signals import result_of

T = TypeVar("T")


class Driver(ABC):
    """Takes requests from any thread; what it does with them runs on an event loop in a thread of its own."""

    config: Config

    def __init__(self, id: str, on_event: Callable[[Event], None] | None) -> None:
        self.id = id
        self._listener = Listener(on_event) if on_event is not None else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"disagg_ray-{id}", daemon=True)
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

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it here."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return result_of(future)
        except BaseException:
            future.cancel()
            raise

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
