"""Replicas that outlive their driver: adopted by the next one, and changed in number and kind while they serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import ray

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.driver.calls import Actor, Post, ask, gather_ready
from disagg_ray.driver.fleet import Fleet
from disagg_ray.driver.metrics import Metrics
from disagg_ray.driver.placement import living, posts_of
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import DisaggError, ReplicaLost, StartError
from disagg_ray.graph import Graph
from disagg_ray.replica.messages import Description, DriverInfo, Health, ReplicaInfo, ReplicaState, Spec
from disagg_ray.replica.software import check_same
from disagg_ray.service.rollout import Rollout, kind, kind_of

logger = logging.getLogger("disagg_ray")

STATE_S = 30.0
"""A living replica that has not told of itself by then is replaced."""
EMPTY_S = 60.0
"""How long a replica that retires waits for others to have pulled what it made; what is left is made again."""
LOOK_S = 0.5
RETRY_S = 300.0
"""Longest pause before what a rollout left behind is replaced again."""


class ServiceFleet(Fleet):
    """A fleet of detached actors.

    What it is to be, the spec, is kept by the replicas: whoever drives them next learns it from them.
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
        self._unsettled = asyncio.Event()
        """Some replica may have been launched with something else than the spec says."""
        self._target: frozenset[Post] = frozenset()
        """Posts that a rollout wants beside the spec's."""
        self.held: set[Post] = set()
        """Posts that only a rollout fills."""
        self.rollout = ""
        """What a rollout does now; empty: there is none."""

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
        there = sorted(await off_loop(living, self._name), key=lambda actor: actor.incarnation)
        states = await asyncio.gather(*(self._ask_state(actor) for actor in there))
        specs = [told.spec for told in states if told is not None and told.spec is not None]
        if specs:
            spec = max(specs, key=lambda spec: spec.revision)
            self._revision, self.config, self._placement.config = spec.revision, spec.config, spec.config
        described = []
        posts = {post.name: post for post in self._placement.posts()}
        for actor in there:
            self._incarnations[actor.name] = actor.incarnation + 1
        for actor, told in sorted(zip(there, states, strict=True), key=self._worth, reverse=True):
            post = posts.get(actor.name)
            if post is None or told is None or (told.info is None and not told.fresh):
                ray.kill(actor.handle)
                continue
            adopted = replace(actor, post=posts.pop(actor.name))
            self._launched[adopted.id] = kind(told.config.stages[post.stage])
            if told.info is None:
                self._starting[post] = adopted
                continue
            self._adopted[adopted] = told.info
            described.append(told.description)
        return described

    def _worth(self, found: tuple[Actor, ReplicaState | None]) -> tuple[bool, bool, int]:
        """Order the actors of one post, of which a rollout that was broken off may leave two; the greatest takes it."""
        actor, told = found
        if told is None or actor.stage not in self.config.stages:
            return False, False, actor.incarnation
        wanted = {post.name: kind_of(self.config, post) for post in self._placement.posts()}
        return told.info is not None, kind(told.config.stages[actor.stage]) == wanted.get(actor.name), actor.incarnation

    @staticmethod
    async def _ask_state(actor: Actor) -> ReplicaState | None:
        try:
            async with asyncio.timeout(STATE_S):
                told: ReplicaState = await ask(actor, "state")
            check_same(actor.name, told.description.software)
        except (TimeoutError, DisaggError) as error:
            logger.warning("replica %s is not adopted: %s", actor.name, error or f"no answer for {STATE_S:g} s")
            return None
        return told

    def _loaded(self) -> Sequence[Actor]:
        return [*self._adopted, *self.actors]

    async def load(self, graph: Graph, driver_info: DriverInfo, driver_met: Callable[[], frozenset[str]]) -> None:
        self._graph, self._driver_info, self._driver_met = graph, driver_info, driver_met
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
        await super().load(graph, driver_info, driver_met)
        self._reconcile()
        self._unsettled.set()
        self._spawn(self._settle)

    async def _load(self, actors: list[Actor]) -> list[ReplicaInfo]:
        infos = await super()._load(actors)
        await asyncio.gather(*map(self._follow, actors))
        return infos

    async def _follow(self, actor: Actor) -> None:
        try:
            async with asyncio.timeout(STATE_S):
                await ask(actor, "follow", self._driver_info, Spec(self._revision, self.config))
        except TimeoutError:
            raise ReplicaLost(f"{actor.name}: no answer for {STATE_S:g} s") from None

    async def _launch(self, post: Post, config: Config | None = None) -> Actor:
        launched_with = kind_of(config or self.config, post)
        actor = await super()._launch(post, config)
        self._launched[actor.id] = launched_with
        return actor

    async def resize(self, config: Config) -> None:
        """Become what `config` says, which differs in no more than what may change without new replicas.

        Returns once the replicas know of it; those that are added start, and those that are not wanted retire.
        """
        self.config = self._placement.config = config
        self._revision += 1
        self._vacancies.reopen()
        known = {*self._actors, *(actor.id for actor in self._starting.values())}
        self._launched = {id: settings for id, settings in self._launched.items() if id in known}
        following = [self._follow(actor) for actor in self._actors.values()]
        await asyncio.gather(*following, return_exceptions=True)  # one that is dead is noticed elsewhere
        self._reconcile()

    async def roll_out(self, config: Config) -> None:
        """Become what `config` says, replica by replica; returns when all that it asks for serve.

        The spec stays as it was until then: if this process dies, the next one goes back to that.

        Raises:
            DisaggError: why one did not start; what was replaced by then is put back.
        """
        async with self._rolling:
            try:
                with self._owning(config):
                    await Rollout(self, config).run()
                    await self.resize(config)
            finally:
                self._unsettled.set()

    @contextmanager
    def _owning(self, config: Config) -> Iterator[None]:
        """Let a rollout alone fill the posts that it vacates, and those that only `config` has."""
        self._target = frozenset(posts_of(config))
        try:
            yield
        finally:
            self._target, self.rollout = frozenset(), ""
            self.held.clear()
            self._reconcile()

    async def _settle(self) -> None:
        """Replace what was launched with something else than the spec says, as a rollout that failed leaves it."""
        while True:
            await self._unsettled.wait()
            self._unsettled.clear()
            pause_s = LOOK_S
            while self._starting or Rollout(self, self.config).next_outdated() is not None:
                async with self._rolling:
                    try:
                        with self._owning(self.config):
                            await Rollout(self, self.config).replace_outdated()
                    except DisaggError as error:
                        pause_s = min(2 * pause_s, RETRY_S)
                        logger.warning("not every replica is what the spec says: %s", error)
                await asyncio.sleep(pause_s)

    async def start(self, post: Post, config: Config, limit_s: float | None = None) -> bool:
        """Have a replica that is launched with `config` serve at a post; False: it had not begun after `limit_s`.

        Raises:
            DisaggError: why it did not start.
        """
        while post in self._launching:
            await asyncio.sleep(LOOK_S)
        if (other := self._starting.pop(post, None)) is not None:
            ray.kill(other.handle)
        actor = await self._launch(post, config)
        try:
            try:
                async with asyncio.timeout(limit_s):
                    await gather_ready(config, [actor], "describe")
            except TimeoutError:
                return False
            (info,) = await self._load([actor])
            self._enlist(actor, info)
            return True
        finally:
            if self._starting.get(post) is actor:
                del self._starting[post]
                ray.kill(actor.handle)

    async def retire(self, actor: Actor) -> None:
        """End a replica that a rollout replaces; nobody else takes its post until the rollout is over."""
        self.held.add(actor.post)
        self._retiring.add(actor.id)
        await self._retire(actor)

    def say(self, doing: str) -> None:
        self.rollout = doing
        logger.info("rollout: %s", doing)

    def is_retiring(self, actor: Actor) -> bool:
        return actor.id in self._retiring

    def launched_with(self, actor: Actor) -> StageConfig:
        return self._launched[actor.id]

    def starting_as(self, config: Config) -> set[Post]:
        """Return the posts where a replica starts that was launched with what `config` says."""
        posts = set(posts_of(config)) & set(self._starting)
        return {post for post in posts if self._launched[self._starting[post].id] == kind_of(config, post)}

    def has_room(self, post: Post, config: Config) -> bool:
        """Return whether the cluster has, or will have, room for one more replica at a post; waits for Ray."""
        return self._placement.has_room(post, config)

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
            if actor.post not in wanted | self._target and actor.id not in self._retiring:
                self._retiring.add(actor.id)
                self._spawn(self._retire, actor)
        for post, actor in self._starting.items():
            if post not in wanted | self._target:
                ray.kill(actor.handle)

    async def _take_up(self, post: Post) -> None:
        if await self._fill(post):
            self._reconcile()  # it may not be wanted any more

    async def _retire(self, actor: Actor) -> None:
        """End a replica once it computes nothing and others have pulled what it made."""
        if not self.is_serving(actor):
            return
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

    def _is_vacant(self, post: Post) -> bool:
        return post not in self.held and super()._is_vacant(post)
