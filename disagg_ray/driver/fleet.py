"""The replicas of all stages: started, watched, and replaced when they die or hang."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

import ray

from disagg_ray.config.schema import Config
from disagg_ray.driver.calls import Actor, Post, ask, gather_ready
from disagg_ray.driver.metrics import Metrics
from disagg_ray.driver.outages import Outages, Vacancies
from disagg_ray.driver.placement import Placement
from disagg_ray.driver.tasks import BackgroundTasks
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import DisaggError, InputError, ReplicaLost, StartError
from disagg_ray.graph import Graph
from disagg_ray.replica.messages import Description, DriverInfo, Health, ReplicaInfo
from disagg_ray.replica.software import check_same
from disagg_ray.scheduling.blame import MAX_IN_A_ROW, Ledger
from disagg_ray.scheduling.scheduler import StageScheduler

logger = logging.getLogger("disagg_ray")

CLOSE_S = 5.0
"""How long closing waits for replicas to give their pools back before it kills them."""
MAX_STARTS = 3
"""Times in a row that a replica of a pipeline of one's own may find its configuration or model at fault."""
LOOK_S = 10.0
"""Replicas are asked how they are at least this often."""


class Fleet:
    """Owns the actors; whatever is called here is called on the driver's event loop.

    `on_lost` hears of each replica that is gone, `on_hopeless` of a stage that has had none for too long, and None when
    every stage has one again. What is at fault when something fails: see `blame`.
    """

    def __init__(
        self,
        config: Config,
        pipeline_id: str,
        on_lost: Callable[[Actor, ReplicaInfo], None],
        on_hopeless: Callable[[StartError | None], None],
        metrics: Metrics,
        *,
        standing: bool = False,
    ) -> None:
        self.config, self._metrics = config, metrics
        self._placement = Placement(config, pipeline_id, standing=standing)
        self._on_lost = on_lost
        self._standing = standing
        self.schedulers = {stage: StageScheduler() for stage in config.stages}
        self._ledgers = {stage: Ledger() for stage in config.stages}
        self.num_restarts = dict.fromkeys(config.stages, 0)
        self.healths: dict[str, Health] = {}
        """By replica, as last heard."""
        self._actors: dict[str, Actor] = {}
        """Those that serve, by id."""
        self._infos: dict[str, ReplicaInfo] = {}
        self._starting: dict[Post, Actor] = {}
        self._launching: dict[Post, asyncio.Future[Actor]] = {}
        """Actors that Ray is being asked for."""
        self._vacancies: Vacancies[Post] = Vacancies()
        self._outages = Outages(config.stages, on_hopeless)
        self._incarnations: Counter[str] = Counter()
        """Of each post's next actor, by name."""
        self._stalled: set[str] = set()
        """Ids of replicas that were given up because they hung."""
        self._background = BackgroundTasks(metrics.task_restarted)
        self._graph: Graph | None = None
        self._driver_info: DriverInfo
        self._driver_met: Callable[[], frozenset[str]]

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """Those that serve, by stage and index, with those that only finish what they began."""
        stages = list(self.config.stages)
        serving = sorted(self._actors.values(), key=lambda actor: (stages.index(actor.stage), actor.post.index))
        return tuple(self._infos[actor.id] for actor in serving)

    def blocks_of(self, actor: Actor) -> dict[str, str]:
        """Return what a serving replica's outputs follow from, as digests by block."""
        return self._infos[actor.id].blocks

    def digests_of(self, stage: str) -> dict[str, set[str]]:
        """Return, by block of a stage, the digests that its serving replicas have: several while it changes."""
        found: dict[str, set[str]] = {block: set() for block in self.config.stages[stage].blocks}
        for info in self._infos.values():
            if info.stage == stage:
                for block, digest in info.blocks.items():
                    found.setdefault(block, set()).add(digest)
        return found

    @property
    def actors(self) -> tuple[Actor, ...]:
        return tuple(self._actors.values())

    def actor(self, replica_id: str) -> Actor:
        """Return a serving replica.

        Raises:
            ReplicaLost: it was lost since the scheduler named it.
        """
        try:
            return self._actors[replica_id]
        except KeyError:
            raise ReplicaLost(f"{replica_id} was lost before it was reached") from None

    def is_serving(self, actor: Actor) -> bool:
        return actor.id in self._actors

    def has_stalled(self, actor: Actor) -> bool:
        return actor.id in self._stalled

    async def launch(self) -> list[Description]:
        """Create every replica and learn what the stages are."""
        await off_loop(self._placement.reserve)
        for post in self._placement.posts():
            await self._launch(post)
        return await self._describe(list(self._starting.values()))

    async def _describe(self, actors: list[Actor]) -> list[Description]:
        """Wait until actors are up; learn what their stages are.

        Raises:
            StartError: one runs another version than the driver.
        """
        described: list[Description] = await gather_ready(self.config, actors, "describe")
        for actor, description in zip(actors, described, strict=True):
            check_same(actor.name, description.software)
        return described

    async def _launch(self, post: Post, config: Config | None = None) -> Actor:
        incarnation = self._incarnations[post.name]
        self._incarnations[post.name] += 1
        launching = asyncio.ensure_future(off_loop(self._placement.launch, post, incarnation, config))
        self._launching[post] = launching
        try:
            actor = self._starting[post] = await asyncio.shield(launching)
        finally:
            if launching.done():  # or the fleet is being closed, which ends it
                del self._launching[post]
        return actor

    async def met(self) -> frozenset[str]:
        """Return the names of the sessions that living replicas have read from: nobody else is reached under one."""
        answers = await asyncio.gather(*map(self._met, self._loaded()))
        return frozenset().union(*answers)

    async def _met(self, actor: Actor) -> frozenset[str]:
        """Return the names that a replica has met; of one that does not answer none, since it is to be replaced."""
        try:
            async with asyncio.timeout(self.config.failures.answer_s):
                names: frozenset[str] = await ask(actor, "met")
        except (TimeoutError, DisaggError):
            return frozenset()
        return names

    def _loaded(self) -> Sequence[Actor]:
        """Return those that have a pool and live."""
        return self.actors

    async def load(self, graph: Graph, driver_info: DriverInfo, driver_met: Callable[[], frozenset[str]]) -> None:
        """Load every replica and put it to work for `driver_info`; `driver_met` tells whom the driver has read from."""
        self._graph, self._driver_info, self._driver_met = graph, driver_info, driver_met
        actors = list(self._starting.values())
        for actor, info in zip(actors, await self._load(actors), strict=True):
            self._enlist(actor, info)

    async def _load(self, actors: list[Actor]) -> list[ReplicaInfo]:
        await self._describe(actors)  # they are up: what is met from here on lives
        taken = await self.met() | self._driver_met()
        return await gather_ready(self.config, actors, "load", self._graph, self._driver_info.credentials, taken)

    def _enlist(self, actor: Actor, info: ReplicaInfo) -> None:
        self._starting.pop(actor.post, None)
        self._actors[actor.id], self._infos[actor.id] = actor, info
        self._ledgers[actor.stage].add(actor.id)
        self.schedulers[actor.stage].add(actor.id, actor.post.group, time.monotonic())
        self._outages.end(actor.stage)
        self._spawn(self._watch, actor)

    def note_success(self, actor: Actor) -> None:
        """Note that a replica computed something."""
        self._vacancies.note_success(actor.post)
        self._replace_broken(actor.stage, self._ledgers[actor.stage].succeed(actor.id))

    def note_failure(self, actor: Actor, request: str, elsewhere: AbstractSet[str], error: DisaggError) -> None:
        """Note that a living replica failed a request, which had failed at others before."""
        broken = self._ledgers[actor.stage].fail(actor.id, request, elsewhere)
        self._replace_broken(actor.stage, broken, f", at last so: {error}")

    def _replace_broken(self, stage: str, broken: list[str], said: str = "") -> None:
        for replica_id in broken:
            actor = self._actors[replica_id]
            self.lose(actor, f"{actor.name}: it failed {MAX_IN_A_ROW} requests in a row{said}")

    async def ask(self, actor: Actor, method: str, *args: Any) -> Any:
        """Call a replica, as `placement.ask`; one that is gone is replaced."""
        try:
            return await ask(actor, method, *args)
        except ReplicaLost as error:
            self.lose(actor, str(error))
            raise

    def send(self, actor: Actor, method: str, *args: Any) -> None:
        """Call a replica whose answer nobody waits for; not one that is gone."""
        if self.is_serving(actor):
            self._spawn(self._send, actor, method, *args)

    async def _send(self, actor: Actor, method: str, *args: Any) -> None:
        with suppress(DisaggError):  # it is gone: whoever watches it finds that out
            await ask(actor, method, *args)

    async def _watch(self, actor: Actor) -> None:
        """Ask a replica how it is until it is gone: dead, or without an answer or a step for as long as may be."""
        while self.is_serving(actor):
            stall_s = self.config.failures.stall_s
            answer_s = min(self.config.failures.answer_s, stall_s)
            try:
                async with asyncio.timeout(answer_s):
                    health: Health = await ask(actor, "health")
            except TimeoutError:
                self._stalled.add(actor.id)
                self.lose(actor, f"{actor.name}: no answer for {answer_s:g} s (failures.answer_s)")
                break
            except DisaggError as error:
                self.lose(actor, str(error))
                break
            self.healths[actor.name] = health
            if health.stalled_s > stall_s:
                self._stalled.add(actor.id)
                what = max(health.stalled, key=health.stalled.__getitem__)
                self.lose(actor, f"{actor.name}: no progress of its {what} for failures.stall_s={stall_s:g} s")
            await asyncio.sleep(min(LOOK_S, answer_s / 4))

    def lose(self, actor: Actor, reason: str) -> None:
        """Take a replica out of service for good, and have another take its post. Idempotent."""
        if not self.is_serving(actor):
            return
        logger.warning("replica lost: %s; it is replaced", reason)
        if not self._ledgers[actor.stage].is_fruitful(actor.id):
            self._vacancies.note_failure(actor.post)
        self._spawn(self._replace, actor)
        self._part(actor)

    def _part(self, actor: Actor) -> None:
        """End a replica that serves; what it holds is gone."""
        del self._actors[actor.id]
        info = self._infos.pop(actor.id)
        self.healths.pop(actor.name, None)
        ray.kill(actor.handle)
        for other in self._actors.values():
            self.send(other, "forget", info.sessions)
        self._ledgers[actor.stage].remove(actor.id)
        self.schedulers[actor.stage].remove(actor.id, time.monotonic())
        if not self.schedulers[actor.stage].replicas:
            self._outages.begin(actor.stage)
            self._spawn(self._outages.limit, actor.stage, self.config.cluster.start_timeout_s)
        self._on_lost(actor, info)

    async def _replace(self, lost: Actor) -> None:
        if await self._fill(lost.post):
            self.num_restarts[lost.stage] += 1
            self._metrics.replica_restarted(lost.stage)

    async def _fill(self, post: Post) -> bool:
        """Have an actor take a post, however often it must be tried; return whether one did."""
        if post in self._vacancies:
            return False
        began = time.monotonic()
        with self._vacancies.filling(post):
            while self._is_vacant(post):
                await self._vacancies.closed_time(post)
                if not self._is_vacant(post):
                    break
                if (failure := await self._start(post)) is None:
                    logger.info("replica %s is ready after %.1f s", post.name, time.monotonic() - began)
                    return True
                self._outages.reasons[post.stage] = failure
                if self._is_futile(post, failure, self._vacancies.note_failure(post)):
                    break
                logger.warning("replica %s did not start: %s; it is tried again in %g s", post.name, failure,
                               self._vacancies.pause_s(post))  # fmt: skip
        return False

    async def _start(self, post: Post) -> DisaggError | None:
        """Have a new actor take a post; return why it did not."""
        actor = await self._launch(post)
        try:
            (info,) = await self._load([actor])
            self._enlist(actor, info)
        except DisaggError as error:
            return error
        else:
            return None
        finally:  # whatever it was: the post must not stay taken
            if self._starting.get(post) is actor:
                del self._starting[post]
                ray.kill(actor.handle)

    def _is_futile(self, post: Post, failure: DisaggError, num_failures: int) -> bool:
        """Return whether a post is given up: what its user wrote is at fault, and nobody will change it."""
        if self._standing or not isinstance(failure, InputError) or num_failures < MAX_STARTS:
            return False
        logger.error("replica %s is given up: %s", post.name, failure)
        stages = [other.stage for other in [*(actor.post for actor in self._actors.values()), *self._vacancies]]
        if stages.count(post.stage) == 1:  # this one
            self._outages.give_up(post.stage, f"none starts: {failure}")
        return True

    def _is_vacant(self, post: Post) -> bool:
        """Return whether an actor is wanted there."""
        serving = {actor.post for actor in self._actors.values()}
        return post not in {*serving, *self._starting, *self._launching} and post in self._placement.posts()

    def num_starting(self, stage: str) -> int:
        """Return how many posts of a stage wait for a replica, but for those that are closed for a while."""
        open_posts = {post for post in self._vacancies if not self._vacancies.pause_s(post)}
        return sum(post.stage == stage for post in {*self._starting, *self._launching, *open_posts})

    def count(self) -> None:
        """Say in the metrics how many replicas serve and start, how each is, and how many jobs wait for one."""
        for actor in self.actors:
            if (health := self.healths.get(actor.name)) is not None:
                self._metrics.replica_health(actor.stage, actor.name, health)
        for stage, scheduler in self.schedulers.items():
            self._metrics.replicas(stage, len(scheduler.replicas), self.num_starting(stage))
            self._metrics.queue_depth(stage, scheduler.num_waiting)

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        self._background.start(f"fleet{work.__name__}", work, *args)

    async def close(self) -> None:
        """End every replica: politely for a while, then for good."""
        await self._background.close()
        if self._launching:
            await asyncio.wait(self._launching.values(), timeout=CLOSE_S)
        launched = [call.result() for call in self._launching.values() if call.done() and call.exception() is None]
        actors = [*self._actors.values(), *self._starting.values(), *launched]
        self._actors.clear()
        if not ray.is_initialized():
            return
        if closing := [asyncio.ensure_future(ask(actor, "close")) for actor in actors]:
            await asyncio.wait(closing, timeout=CLOSE_S)
        for call in closing:
            call.cancel()
        await asyncio.gather(*closing, return_exceptions=True)
        await asyncio.wait([asyncio.ensure_future(off_loop(self.kill, actors))], timeout=CLOSE_S)

    def kill(self, actors: Sequence[Actor] = ()) -> None:
        """End replicas at once, these and all that are left; waits for Ray."""
        for actor in [*actors, *self._actors.values(), *self._starting.values()]:
            ray.kill(actor.handle)
        self._placement.close()
