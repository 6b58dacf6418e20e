"""Which replica takes a request: the one with the least outstanding work, first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from disagg_ray.config import REPLICA_WINDOW


class ReplicaLoad:
    """The driver's view of one replica."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.outstanding = 0
        self.turn = asyncio.Lock()
        """Held by the request that computes; the other one waits for it with its inputs already pulled."""


class StageQueue:
    """The replicas of one stage; each holds one request that computes and one that is prefetched."""

    def __init__(self, num_replicas: int) -> None:
        self._room = asyncio.Semaphore(REPLICA_WINDOW * num_replicas)
        self._loads: Sequence[ReplicaLoad] = [ReplicaLoad(index) for index in range(num_replicas)]

    @asynccontextmanager
    async def take(self) -> AsyncIterator[ReplicaLoad]:
        """Wait for a place at the least loaded replica and hold it."""
        async with self._room:
            load = min(self._loads, key=lambda load: load.outstanding)
            load.outstanding += 1
            try:
                yield load
            finally:
                load.outstanding -= 1
