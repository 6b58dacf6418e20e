"""Replicas that outlive their driver: adopted by the next one, and changed in number and kind while they serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import ray

from disagg_ray.config import Config, StageConfig
from disagg_ray.errors import DisaggError, ReplicaLost, StartError
from disagg_ray.fleet import Fleet
from disagg_ray.graph import Graph
from disagg_ray.messages import Charter, Description, Health, Leader, Recollection, ReplicaInfo
from disagg_ray.metrics import Metrics
from disagg_ray.placement import Actor, Post, ask, living
from disagg_ray.software import check_same
from disagg_ray.threads import off_loop

logger = logging.getLogger("disagg_ray")

RECALL_S = 30.0
"""A living replica that has not told of itself by then is replaced."""
EMPTY_S = 60.0
"""How long a replica that retires waits for others to have pulled what it made; what is left is made again."""
LOOK_S = 0.5


class StandingFleet(Fleet):
    """A fleet of detached actors.

    What it is to be, the charter, is kept by the replicas: whoever drives them next learns it from them.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        on_lost: Callable[[Actor, ReplicaInfo], None],
        on_hopeless: Callable[[StartError | None], None],
        metrics: Metrics,
    ) -> None:
        super().__init__(config, name, on_lost, on_hopeless, metrics, standing=True)
        self._name = name
        self._revision = 0
        self._adopted: dict[Actor, ReplicaInfo] = {}
        self._launched: dict[str, StageConfig] = {}
        """What each actor, by id, was launched with."""
        self._retiring: set[str] = set()
        """Ids of actors."""
        self._rolling = asyncio.Lock()

    async def launch(self) -> list[Description]:
        """Adopt what lives, and create replicas for stages that have none; learn what the stages are."""
        await off_loop(self._placement.reserve)
        described = await self._adopt()
        there = {actor.stage for actor in [*self._adopted, *self._starting.values()]}
        for post in self._placement.posts():
            if post.stage not in there:
                await self._launch(post)
        return described + await self._describe(list(self._starting.values()))

    async def _adopt(self) -> list[Description]:
        there = sorted(living(self._name), key=lambda actor: -actor.incarnation)  # the latest takes the post
        recalled = await asyncio.gather(*(self._recall(actor) for actor in there))
        charters = [told.charter for told in recalled if told is not None and told.charter is not None]
        if charters:
            charter = max(charters, key=lambda charter: charter.revision)
            self._revision, self.config, self._placement.config = charter.revision, charter.config, charter.config
        described = []
        posts = {post.name: post for post in self._placement.posts()}
        for actor in reversed(there):
            self._incarnations[actor.name] = actor.incarnation + 1
        for actor, told in zip(there, recalled, strict=True):
            post = posts.get(actor.name)
            if post is None or told is None or (told.info is None and not told.fresh):
                ray.kill(actor.handle)
                continue
            adopted = replace(actor, post=posts.pop(actor.name))
            self._launched[adopted.id] = _kind(told.config.stages[post.stage])
            if told.info is None:
                self._starting[post] = adopted
                continue
            self._adopted[adopted] = told.info
            described.append(told.description)
        return described

    @staticmethod
    async def _recall(actor: Actor) -> Recollection | None:
        try:
            async with asyncio.timeout(RECALL_S):
                told: Recollection = await ask(actor, "recall")
            check_same(actor.name, told.description.software)
        except (TimeoutError, DisaggError) as error:
            logger.warning("replica %s is not adopted: %s", actor.name, error or f"no answer for {RECALL_S:g} s")
            return None
        return told

    def _loaded(self) -> Sequence[Actor]:
        return [*self._adopted, *self.actors]

    async def load(self, graph: Graph, leader: Leader, driver_met: Callable[[], frozenset[str]]) -> None:
        self._graph, self._leader, self._driver_met = graph, leader, driver_met
        for actor, info in self._adopted.items():
            try:
                await self._follow(actor)
            except DisaggError as error:
                logger.warning("replica %s was not adopted: %s", actor.name, error)
            else:
                self._enlist(actor, info)
        if self._adopted:
            logger.info("%d replicas adopted", len(self._actors))
        self._adopted.clear()
        await super().load(graph, leader, driver_met)
        self._reconcile()
        self._spawn(self._roll)

    async def _load(self, actors: list[Actor]) -> list[ReplicaInfo]:
        infos = await super()._load(actors)
        await asyncio.gather(*map(self._follow, actors))
        return infos

    async def _follow(self, actor: Actor) -> None:
        try:
            async with asyncio.timeout(RECALL_S):
                await ask(actor, "follow", self._leader, Charter(self._revision, self.config))
        except TimeoutError:
            raise ReplicaLost(f"{actor.name}: no answer for {RECALL_S:g} s") from None

    async def _launch(self, post: Post) -> Actor:
        kind = self._wanted_kind(post)
        actor = await super()._launch(post)
        self._launched[actor.id] = kind
        return actor

    async def change(self, config: Config) -> None:
        """Become what `config` says, replica by replica; returns once the replicas know of it."""
        self.config = self._placement.config = config
        self._revision += 1
        self._vacancies.reopen()
        following = [self._follow(actor) for actor in self._actors.values()]
        await asyncio.gather(*following, return_exceptions=True)  # one that is dead is noticed elsewhere
        self._reconcile()
        self._spawn(self._roll)

    def room_for(self, stage: str) -> int:
        """Return how many more replicas of a stage the cluster can take now."""
        return self._placement.room_for(stage)

    def _reconcile(self) -> None:
        """Fill the posts that are vacant, and retire those that are not wanted any more."""
        wanted = set(self._placement.posts())
        for post in wanted:
            if self._is_vacant(post):
                self._spawn(self._take_up, post)
        for actor in self.actors:
            if actor.post not in wanted and actor.id not in self._retiring:
                self._retiring.add(actor.id)
                self._spawn(self._retire, actor)
        for post, actor in self._starting.items():
            if post not in wanted:
                ray.kill(actor.handle)

    async def _take_up(self, post: Post) -> None:
        if await self._fill(post):
            self._reconcile()  # it may not be wanted any more

    async def _retire(self, actor: Actor) -> None:
        """End a replica once it computes nothing and others have pulled what it made."""
        logger.info("replica %s retires", actor.name)
        idle = asyncio.Event()
        self.schedulers[actor.stage].retire(actor.id, time.monotonic(), idle.set)
        await idle.wait()
        deadline = time.monotonic() + EMPTY_S
        while self.is_serving(actor) and time.monotonic() < deadline:
            try:
                health: Health = await self.ask(actor, "health")
            except DisaggError:
                break
            if not health.bytes_in_use and not health.num_videos:
                break
            await asyncio.sleep(LOOK_S)
        self._retiring.discard(actor.id)
        if self.is_serving(actor):
            self._part(actor)
        self._reconcile()

    async def _roll(self) -> None:
        """Replace, one at a time, the replicas that were launched with another configuration."""
        async with self._rolling:
            for actor in self.actors:
                outdated = self._launched[actor.id] != self._wanted_kind(actor.post)
                if not outdated or not self.is_serving(actor) or actor.id in self._retiring:
                    continue
                self._retiring.add(actor.id)
                await self._retire(actor)
                await self._occupied(actor.post)

    async def _occupied(self, post: Post) -> None:
        """Wait until an actor serves at a post, or it is given up."""
        await asyncio.sleep(LOOK_S)
        while post in self._starting:
            await asyncio.sleep(LOOK_S)

    def _wanted_kind(self, post: Post) -> StageConfig:
        return _kind(self.config.for_group(post.stage, post.group).stages[post.stage])


def _kind(settings: StageConfig) -> StageConfig:
    """Return a stage's settings without how many replicas there are: those that a replica is launched with."""
    return replace(settings, replicas=1, min_replicas=None, max_replicas=None, groups={})
