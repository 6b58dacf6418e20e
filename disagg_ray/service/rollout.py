"""Changes of what replicas are launched with: a new one serves before an old one goes, wherever there is room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from disagg_ray.config.schema import Config
from disagg_ray.driver.calls import ReplicaId, replicas_of
from disagg_ray.driver.fleet import Fleet
from disagg_ray.driver.placement import has_room, settings_of
from disagg_ray.driver.runner import ReplicaRunner
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import DisaggError

logger = logging.getLogger("disagg_ray")

ROOM_S = 5.0
"""How long room may take to show that a replica which ended has left."""
SURGE_S = 300.0
"""How long a replica that there seemed to be room for may take to begin before its predecessor makes room for it."""
LOOK_S = 0.5
SETTLE_S, RETRY_S = 2.0, 300.0
"""How often outdated replicas are looked for; after failures the pause doubles up to the second."""


class Rollouts:
    """Replaces a fleet's replicas one at a time by those of another configuration."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._lock = asyncio.Lock()
        self.status = ""
        """What a rollout does now; empty: none is under way."""

    async def roll_out(self, config: Config) -> None:
        """Become what `config` says, replica by replica; return when all that it asks for serve.

        The spec stays as it was until then: if this process dies, the next one goes back to that.

        Raises:
            DisaggError: why one did not start; `settle` puts back what was replaced by then.
        """
        async with self._lock:
            with self._holding(config):
                await self._replace_outdated(config)
                await self._add_missing(config)
                await self._fleet.resize(config)

    async def settle(self) -> None:
        """Replace whenever needed what was launched with something else than the spec says, as after a failed rollout.

        Runs until it is cancelled.
        """
        pause_s = SETTLE_S
        while True:
            async with self._lock:
                config = self._fleet.config
                if self._next_outdated(config) is not None:
                    try:
                        with self._holding(config):
                            await self._replace_outdated(config)
                        pause_s = SETTLE_S
                    except DisaggError as error:
                        pause_s = min(2 * pause_s, RETRY_S)
                        logger.warning("not every replica is what the spec says: %s", error)
            await asyncio.sleep(pause_s)

    @contextmanager
    def _holding(self, config: Config) -> Iterator[None]:
        """Have the fleet leave alone the replicas that only `config` has, and those that the rollout ends."""
        self._fleet.held = set(replicas_of(config)) - set(replicas_of(self._fleet.config))
        try:
            yield
        finally:
            self._fleet.held, self.status = set(), ""
            self._fleet.reconcile()

    async def _replace_outdated(self, config: Config) -> None:
        while (outdated := self._next_outdated(config)) is not None:
            await self._replace(*outdated, config)

    def _next_outdated(self, config: Config) -> tuple[ReplicaRunner, ReplicaId] | None:
        """Return a replica that serves, is wanted, and was launched with something else, and what it is to become."""
        wanted = {replica.name: replica for replica in replicas_of(config)}
        for runner in self._fleet.runners:
            replica = wanted.get(runner.replica.name)
            if replica is None or runner.actor is None or runner.is_retiring:
                continue
            if runner.replica != replica or runner.actor.settings != settings_of(config, replica):
                return runner, replica
        return None

    async def _replace(self, runner: ReplicaRunner, replica: ReplicaId, config: Config) -> None:
        self._say(f"{replica.name}: its successor starts beside it")
        begin_s = None if config.service.cluster_grows else SURGE_S
        if await self._has_room(replica, config) and await self._fleet.start(replica, config, begin_s):
            await self._retire(runner)
            return
        others = sum(actor.stage == replica.stage for actor in self._fleet.actors) - 1
        self._say(f"{replica.name}: no room for one more; it ends before its successor starts, {others} others serve")
        await self._retire(runner)
        await self._fleet.start(replica, config)

    async def _retire(self, runner: ReplicaRunner) -> None:
        self._fleet.held.add(runner.replica)
        await self._fleet.retire(runner)

    async def _has_room(self, replica: ReplicaId, config: Config) -> bool:
        deadline = time.monotonic() + ROOM_S
        while not await off_loop(has_room, config, replica):
            if time.monotonic() > deadline or replica.stage in config.share_gpu:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    async def _add_missing(self, config: Config) -> None:
        """Start the replicas that are missing, all at once; end those that go first where they take the room."""
        fleet, wanted = self._fleet, replicas_of(config)
        missing = [replica for replica in wanted if not self._is_present(replica, config)]
        if not missing:
            return
        self._say(f"{', '.join(replica.name for replica in missing)} start")
        fleet.hold(missing)
        names = {replica.name for replica in wanted}
        going = [runner for runner in fleet.runners if runner.replica.name not in names and not runner.is_retiring]
        if going and not await self._has_room(missing[0], config):
            await asyncio.gather(*map(self._retire, going))
        outcomes = await asyncio.gather(*(fleet.start(replica, config) for replica in missing), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _is_present(self, replica: ReplicaId, config: Config) -> bool:
        """Return whether a replica serves, or is being started with what `config` says."""
        is_same = replica in replicas_of(self._fleet.config) and (
            settings_of(self._fleet.config, replica) == settings_of(config, replica)
        )
        return any(runner.replica == replica and (runner.actor or is_same) for runner in self._fleet.runners)

    def _say(self, doing: str) -> None:
        self.status = doing
        logger.info("rollout: %s", doing)
