"""The driver's pool: images of requests, copies of finished latents, and raw frames on their way to the driver."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

import torch

from disagg_ray.config.schema import REPLICA_WINDOW, Config
from disagg_ray.driver.threads import begin, within
from disagg_ray.errors import PoolError, TransferError
from disagg_ray.graph import FRAMES, Graph
from disagg_ray.media.video import Frames
from disagg_ray.models.geometry import Geometry
from disagg_ray.replica.sizing import driver_pool_bytes, most_piece_bytes
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool

T = TypeVar("T")

logger = logging.getLogger("disagg_ray")

NUM_COPIES = 2 * REPLICA_WINDOW
"""Copies of each kind at once. For raw frames as many calls again may wait until a slot is freed."""

CLOSE_S = 5.0
"""How long closing waits for copies that are under way."""


class DriverPool:
    """Copies in and out of the driver's pool, off the event loop.

    No copy waits for memory or threads of another kind: raw frames have their own slots, and each kind its limit.
    """

    def __init__(
        self, name: str, config: Config, graph: Graph, geometry: Geometry, host: str, taken: frozenset[str]
    ) -> None:
        nbytes = driver_pool_bytes(config, graph, geometry)
        self._pool = Pool(name, nbytes, host, config.transport, taken=taken)
        self._name = name
        self._limits = {kind: asyncio.Semaphore(NUM_COPIES) for kind in ("out", "hold", "frames")}
        self._copies: set[Future[Any]] = set()
        """Under way."""
        self._piece_bytes = most_piece_bytes(config.limits)
        self.free_pieces: queue.SimpleQueue[AttemptKey | None] = queue.SimpleQueue()
        """Slots for raw frames that are free; None: the pool is closed."""
        self._patience_s = config.failures.stall_s
        self._serial = itertools.count()
        for _ in range(REPLICA_WINDOW):
            self._add_piece()
        self._own_bytes = self._pool.bytes_in_use

    def _add_piece(self) -> None:
        key = AttemptKey("frames", next(self._serial))
        self._pool.reserve(key, {FRAMES: self._piece_bytes})
        self.free_pieces.put(key)

    @property
    def sessions(self) -> tuple[str, ...]:
        """Mooncake's names of the driver's endpoints."""
        return tuple(session.name for session in self._pool.sessions)

    @property
    def known_sessions(self) -> frozenset[str]:
        """Names of the sessions that the driver has read from."""
        return self._pool.met

    @property
    def bytes_in_use(self) -> int:
        """Bytes that requests take."""
        return self._pool.bytes_in_use - self._own_bytes

    @property
    def capacity(self) -> int:
        return self._pool.capacity

    async def publish(self, key: AttemptKey, tensors: Mapping[str, torch.Tensor]) -> Handoff:
        """Put tensors where stages can pull them."""

        def publish() -> Handoff:
            self._pool.reserve(key, {name: tensor.nbytes for name, tensor in tensors.items()})
            return self._pool.publish(key, tensors)

        return await self._run("out", publish)

    async def hold(self, key: AttemptKey, handoff: Handoff) -> tuple[Handoff, dict[str, torch.Tensor]]:
        """Pull a verified copy; return its handoff and the tensors, valid until `key` is released."""

        def pull() -> tuple[Handoff, dict[str, torch.Tensor]]:
            self._pool.reserve(key, {meta.name: meta.spec.nbytes for meta in handoff.tensors})
            tensors = self._pool.pull(key, handoff)
            return self._pool.relay(key, handoff), tensors

        return await self._run("hold", pull)

    async def pull_frames(self, piece: Handoff, into: Frames) -> None:
        """Copy a piece of raw frames to the start of `into`."""

        def pull() -> None:
            key = self._take_piece(piece)
            try:
                pulled = self._pool.pull(key, piece)[FRAMES]
                into[: len(pulled)] = pulled.numpy()
            except BaseException:
                self._pool.release(key)  # a late answer may still write to it
                begin(self._add_piece, f"{self._name}-piece")  # may wait until the peer is known to be dead
                raise
            self.free_pieces.put(key)

        await self._run("frames", pull)

    def _take_piece(self, piece: Handoff) -> AttemptKey:
        try:
            key = self.free_pieces.get(timeout=self._patience_s)
        except queue.Empty:
            session, waited = piece.sessions[0].name, f"within failures.stall_s={self._patience_s:g} s"
            raise TransferError(f"no slot for raw frames became free {waited}", session, piece.nbytes, 0) from None
        if key is None:
            self.free_pieces.put(None)  # for the next
            raise PoolError("the driver's pool is closed")
        return key

    def give_up(self, key: AttemptKey) -> None:
        """Have a copy that still waits for room fail as cancelled: what it is of is lost."""
        self._pool.give_up(key)

    def release(self, key: AttemptKey) -> None:
        self._pool.release(key)

    def forget(self, sessions: tuple[str, ...]) -> None:
        """Free the memory that a dead process might still have written to."""
        for session in sessions:
            self._pool.forget(session)

    def close(self) -> None:
        """End every wait and free the memory; a copy that hangs is left behind."""
        self.free_pieces.put(None)
        within(CLOSE_S, self._pool.close, "closing the driver's pool")
        if left := wait(list(self._copies), CLOSE_S).not_done:
            logger.warning("%d copies of the driver's have hung for %g s: left behind", len(left), CLOSE_S)

    async def _run(self, kind: str, copy: Callable[[], T]) -> T:
        """Make a copy on a thread; cancelling the wait for it does not stop one that has begun."""
        limit, loop = self._limits[kind], asyncio.get_running_loop()

        def end(done: Future[T]) -> None:
            self._copies.discard(done)
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(limit.release)

        await limit.acquire()
        try:
            call = begin(copy, f"{self._name}-{kind}")
        except BaseException:  # no thread could be started, for example
            limit.release()
            raise
        self._copies.add(call)
        call.add_done_callback(end)
        return await asyncio.wrap_future(call)
