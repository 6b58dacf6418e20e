"""Replicas that do not start, and stages that have none left; all on the driver's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress

from disagg_ray.errors import StartError
from disagg_ray.scheduling.blame import pause_s

logger = logging.getLogger("disagg_ray")


class Backoff:
    """Pauses between the starts of one replica, which grow while its actors compute nothing, as `blame` says."""

    def __init__(self) -> None:
        self.num_failures = 0
        """Actors in a row that did not start, or were lost before they had computed anything."""
        self._retry = asyncio.Event()

    @property
    def pause_s(self) -> float:
        return pause_s(self.num_failures)

    async def pause(self) -> None:
        """Wait for the pause, or until `retry_now`."""
        self._retry.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.pause_s):
                await self._retry.wait()

    def retry_now(self) -> None:
        """Forget the failures and end the pause."""
        self.num_failures = 0
        self._retry.set()


class Outages:
    """Stages without a replica: their requests wait for one within a limit, then fail with the stage's name.

    `on_change` is called with the reason when a stage's outage exceeds the limit: nothing can be served then. It is
    called with None once every stage has a replica again.
    """

    def __init__(self, stages: Iterable[str], on_change: Callable[[StartError | None], None]) -> None:
        self._served = {stage: asyncio.Event() for stage in stages}
        self._over_time: set[str] = set()
        self._on_change = on_change
        self.reasons: dict[str, object] = {}
        """Why a replica last did not start, by stage."""

    def end(self, stage: str) -> None:
        """Note that a stage has a replica."""
        self._served[stage].set()
        if stage in self._over_time:
            self._over_time.discard(stage)
            if not self._over_time:
                logger.warning("every stage has a replica again: requests are accepted")
                self._on_change(None)

    def begin(self, stage: str) -> None:
        """Note that a stage has no replica left."""
        self._served[stage].clear()

    async def limit(self, stage: str, limit_s: float) -> None:
        """Wait for a stage's outage to end; report it after `cluster.start_timeout_s`."""
        try:
            async with asyncio.timeout(limit_s):
                await self._served[stage].wait()
        except TimeoutError:
            if self._served[stage].is_set():  # at the same moment
                return
            reason = self.reasons.get(stage, "it is still starting")
            self.report(stage, f"none started within cluster.start_timeout_s={limit_s:g} s: {reason}")

    def report(self, stage: str, reason: str) -> None:
        """Have all requests fail, and refuse more, until the stage has a replica."""
        if stage not in self._over_time:
            self._over_time.add(stage)
            self._on_change(StartError(f"no replica of {stage} is left and {reason}"))
