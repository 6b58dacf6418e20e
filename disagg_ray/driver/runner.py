"""One replica kept running: its actor is started, watched, and followed by another when it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from disagg_ray.driver.calls import Actor, ReplicaId, ask_within
from disagg_ray.driver.outages import Backoff
from disagg_ray.errors import DisaggError, InputError
from disagg_ray.replica.messages import Health

if TYPE_CHECKING:
    from disagg_ray.driver.fleet import Fleet

logger = logging.getLogger("disagg_ray")

HEALTH_S = 10.0
"""Longest time between two health checks of a replica."""
EMPTY_S = 60.0
"""How long a replica that retires waits for others to have pulled its outputs; what is left is made again."""
LOOK_S = 0.5


class ReplicaRunner:
    """Has one actor after another serve as a replica; runs on the driver's event loop."""

    def __init__(self, fleet: Fleet, replica: ReplicaId) -> None:
        self._fleet, self.replica = fleet, replica
        self.actor: Actor | None = None
        """The one that serves."""
        self.health: Health | None = None
        """Its last answer."""
        self.is_retiring = False
        """The actor serves until it is idle, and no other follows."""
        self.backoff = Backoff()
        self._gone = asyncio.Event()
        self._idle = asyncio.Event()
        """The actor retires and computes nothing any more."""

    def serve(self, actor: Actor) -> None:
        """Note that an actor serves."""
        self.actor = actor
        self._gone.clear()
        self._idle.clear()

    def end(self) -> None:
        """Note that the actor is gone."""
        self.actor = self.health = None
        self._gone.set()

    async def run(self) -> None:
        """Start an actor whenever none serves, as long as the replica is wanted."""
        while self._fleet.wants(self):
            if self.actor is None and not await self._start():
                break
            await self._gone.wait()
        self._fleet.drop(self)

    async def _start(self) -> bool:
        """Start an actor, however often it must be tried; return False when none is wanted any more."""
        is_restart, began = self._gone.is_set(), time.monotonic()
        while True:
            await self.backoff.pause()
            if not self._fleet.wants(self):
                return False
            try:
                actor = await self._fleet.launcher.start(self.replica, self._fleet.config)
            except DisaggError as error:
                if not self._retries(error):
                    return False
                continue
            if actor is not None:
                self._fleet.serve(self, actor)
                logger.info("replica %s is ready after %.1f s", self.replica.name, time.monotonic() - began)
                if is_restart:
                    self._fleet.note_restart(self.replica.stage)
                return True

    def _retries(self, error: DisaggError) -> bool:
        """Note that an actor did not start; return False if its user has to change something first."""
        replica, outages, max_starts = self.replica, self._fleet.outages, self._fleet.max_starts
        self.backoff.num_failures += 1
        outages.reasons[replica.stage] = error
        if max_starts is None or not isinstance(error, InputError) or self.backoff.num_failures < max_starts:
            pause_s = self.backoff.pause_s
            logger.warning("replica %s did not start: %s; next attempt in %g s", replica.name, error, pause_s)
            return True
        logger.error("replica %s is not started again: %s", replica.name, error)
        if [other.replica.stage for other in self._fleet.runners].count(replica.stage) == 1:  # this one
            outages.report(replica.stage, f"none starts: {error}")
        return False

    async def retire(self) -> None:
        """End the actor once it computes nothing and others have pulled what it made; no other follows. Idempotent."""
        if (actor := self.actor) is None:
            return
        scheduler, self.is_retiring = self._fleet.schedulers[actor.stage], True
        if actor.id in scheduler.replicas:
            logger.info("replica %s retires", actor.name)
            scheduler.retire(actor.id, time.monotonic(), self._idle.set)
        await self._idle.wait()
        deadline = time.monotonic() + EMPTY_S
        while self.actor is not None and time.monotonic() < deadline:
            try:
                health: Health = await self._fleet.ask(actor, "health")
            except DisaggError:
                break
            if not health.bytes_in_use and not health.num_videos:
                break
            await asyncio.sleep(LOOK_S)
        self._fleet.remove(actor)

    async def watch(self, actor: Actor) -> None:
        """Check an actor's health until it is replaced: it died, does not answer, or makes no progress."""
        while self.actor is actor:
            failures = self._fleet.config.failures
            answer_s = min(failures.answer_s, failures.stall_s)
            try:
                health: Health = await ask_within(answer_s, actor, "health")
            except TimeoutError as error:
                self._fleet.replace(actor, f"{error} (failures.answer_s)", is_stalled=True)
                break
            except DisaggError as error:
                self._fleet.replace(actor, str(error))
                break
            if self.actor is actor:
                self.health = health
            if health.stalled_s > failures.stall_s:
                work = max(health.stalled, key=health.stalled.__getitem__)
                reason = f"{actor.name}: no progress of its {work} for failures.stall_s={failures.stall_s:g} s"
                self._fleet.replace(actor, reason, is_stalled=True)
            await asyncio.sleep(min(HEALTH_S, answer_s / 4))
