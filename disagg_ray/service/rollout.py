"""A change of what replicas are launched with: a new one serves before an old one goes, wherever there is room."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.driver.calls import Actor, Post
from disagg_ray.driver.placement import posts_of
from disagg_ray.driver.threads import off_loop

if TYPE_CHECKING:
    from disagg_ray.service.fleet import ServiceFleet

logger = logging.getLogger("disagg_ray")

ROOM_S = 5.0
"""How long room may take to show that a replica which ended has left."""
SURGE_S = 300.0
"""How long a replica that there seemed to be room for may take to begin before its predecessor makes room for it."""
LOOK_S = 0.5


class Rollout:
    """Makes a fleet's replicas those of `config`, one at a time; raises, at the first that does not start, why."""

    def __init__(self, fleet: ServiceFleet, config: Config) -> None:
        self._fleet, self._config = fleet, config
        self._posts = {post.name: post for post in posts_of(config)}

    async def run(self) -> None:
        """Replace what is outdated, then start what is missing.

        Raises:
            DisaggError: why a replica did not start. Those that were replaced before stay so.
        """
        await self.replace_outdated()
        await self._add()

    async def replace_outdated(self) -> None:
        """Replace what serves and was launched with something else."""
        while (actor := self.next_outdated()) is not None:
            await self._replace(actor, self._posts[actor.name])

    def next_outdated(self) -> Actor | None:
        """Return a replica that serves, is wanted, and was launched with something else."""
        fleet = self._fleet
        there = (actor for actor in fleet.actors if actor.name in self._posts and not fleet.is_retiring(actor))
        return next((actor for actor in there if not self._is_current(actor)), None)

    def _is_current(self, actor: Actor) -> bool:
        post = self._posts[actor.name]
        return actor.post == post and self._fleet.launched_with(actor) == kind_of(self._config, post)

    async def _replace(self, actor: Actor, post: Post) -> None:
        fleet = self._fleet
        fleet.say(f"{post.name}: its successor starts beside it")
        if await self._has_room(post) and await self._surge(post):
            await fleet.retire(actor)
            return
        others = sum(other.stage == post.stage for other in fleet.actors) - 1
        fleet.say(f"{post.name}: no room for one more; it ends before its successor starts, {others} others serve")
        await fleet.retire(actor)
        await fleet.start(post, self._config)

    async def _has_room(self, post: Post) -> bool:
        deadline = time.monotonic() + ROOM_S
        while not await off_loop(self._fleet.has_room, post, self._config):
            if time.monotonic() > deadline or post.stage in self._config.share_gpu:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    async def _surge(self, post: Post) -> bool:
        """Have one more replica serve; return False where it found no room after all."""
        limit_s = None if self._config.service.cluster_grows else SURGE_S
        return await self._fleet.start(post, self._config, limit_s)

    async def _add(self) -> None:
        """Start what is wanted and not there, all at once, those that go first where they take its room."""
        fleet = self._fleet
        there = {actor.post for actor in fleet.actors} | fleet.starting_as(self._config)
        missing = [post for post in self._posts.values() if post not in there]
        if not missing:
            return
        fleet.say(f"{', '.join(post.name for post in missing)} start")
        going = [actor for actor in fleet.actors if actor.name not in self._posts and not fleet.is_retiring(actor)]
        if going and not await self._has_room(missing[0]):
            await asyncio.gather(*map(fleet.retire, going))
        outcomes = await asyncio.gather(*(fleet.start(post, self._config) for post in missing), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome


def kind_of(config: Config, post: Post) -> StageConfig:
    """Return what a replica is launched with at a post."""
    return kind(config.for_group(post.stage, post.group).stages[post.stage])


def kind(settings: StageConfig) -> StageConfig:
    """Return a stage's settings without how many replicas there are."""
    return replace(settings, replicas=1, min_replicas=None, max_replicas=None, groups={})
