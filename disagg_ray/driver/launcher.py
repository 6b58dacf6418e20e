"""Actors on their way into service: launched or adopted, loaded, and killed when they do not get there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from disagg_ray.config.schema import Config
from disagg_ray.driver.calls import Actor, ReplicaId, ask_within, gather_ready, replicas_of
from disagg_ray.driver.names import find_replicas, release_gangs
from disagg_ray.driver.placement import Placement, settings_of, without_count
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import DisaggError, ReplicaLost
from disagg_ray.graph import Graph
from disagg_ray.replica.messages import Description, DriverInfo, ReplicaState, Spec
from disagg_ray.replica.software import check_same

logger = logging.getLogger("disagg_ray")

STATE_S = 30.0
"""A living replica that has not answered by then is replaced."""
FOLLOW_S = 30.0
"""A replica that has not accepted its driver by then is lost."""
CLOSE_S = 5.0
"""How long closing waits for launches that Ray has not answered."""


class Launcher:
    """Owns each actor of a pipeline until it serves; runs on the driver's event loop."""

    def __init__(
        self, config: Config, pipeline_id: str, serving: Callable[[], Iterable[Actor]], *, detached: bool
    ) -> None:
        self.spec = Spec(0, config)
        """What the pipeline is to be; replicas keep it for the next driver."""
        self._pipeline_id, self._serving, self._detached = pipeline_id, serving, detached
        self._placement = Placement(pipeline_id, detached=detached)
        self._adopted: list[Actor] = []
        """Loaded by an earlier driver."""
        self._starting: list[Actor] = []
        """Actors that Ray starts, or that load."""
        self._launching: dict[asyncio.Future[Actor], str] = {}
        """Actors that Ray is asked to create, and their stages."""
        self._incarnations: dict[str, int] = {}
        """Of each replica's next actor, by name."""
        self._graph: Graph
        self._driver_info: DriverInfo
        self._driver_sessions: Callable[[], frozenset[str]]

    def num_starting(self, stage: str) -> int:
        """Return how many actors of a stage start; replicas that pause between attempts do not count."""
        return [*(actor.stage for actor in self._starting), *self._launching.values()].count(stage)

    async def launch(self) -> list[Description]:
        """Launch every replica; of a service adopt those that run, and launch those of stages that have none."""
        await off_loop(self._placement.reserve, self.spec.config)
        described = []
        if self._detached:
            self.spec, adopted, self._incarnations = await adopt(self._pipeline_id, self.spec.config)
            for actor, description in adopted:
                if actor.info is None:
                    self._starting.append(actor)
                else:
                    self._adopted.append(actor)
                    described.append(description)
        present = {actor.stage for actor in [*self._adopted, *self._starting]}
        for replica in replicas_of(self.spec.config):
            if replica.stage not in present:
                await self._launch(replica, self.spec.config)
        return described + await self._describe(self._starting, self.spec.config)

    async def load(
        self, graph: Graph, driver_info: DriverInfo, driver_sessions: Callable[[], frozenset[str]]
    ) -> list[Actor]:
        """Load the actors that were launched; have those that were adopted work for this driver."""
        self._graph, self._driver_info, self._driver_sessions = graph, driver_info, driver_sessions
        followed = await asyncio.gather(*map(self._follow, self._adopted), return_exceptions=True)
        actors = await self._load(self._starting)
        self._starting.clear()
        for actor, error in zip(self._adopted, followed, strict=True):
            if error is None:
                actors.append(actor)
            else:
                logger.warning("replica %s is not adopted: %s", actor.name, error)
                await off_loop(actor.kill)
        self._adopted.clear()
        return actors

    async def start(self, replica: ReplicaId, config: Config, begin_s: float | None = None) -> Actor | None:
        """Launch and load an actor; return None if Ray has not started it after `begin_s` seconds.

        Raises:
            DisaggError: why it did not start.
        """
        actor = await self._launch(replica, config)
        loaded: Actor | None = None
        try:
            async with asyncio.timeout(begin_s):
                await self._describe([actor], config)
            (loaded,) = await self._load([actor])
            return loaded
        except TimeoutError:
            return None
        finally:
            self._starting.remove(actor)
            if loaded is None:
                await off_loop(actor.kill)

    async def _launch(self, replica: ReplicaId, config: Config) -> Actor:
        incarnation = self._incarnations.get(replica.name, 0)
        self._incarnations[replica.name] = incarnation + 1
        launching = asyncio.ensure_future(off_loop(self._placement.launch, config, replica, incarnation))
        self._launching[launching] = replica.stage
        launching.add_done_callback(self._launching.pop)
        try:
            actor = await asyncio.shield(launching)
        except asyncio.CancelledError:
            launching.add_done_callback(_kill_launched)
            raise
        self._starting.append(actor)
        return actor

    async def _describe(self, actors: Sequence[Actor], config: Config) -> list[Description]:
        """Wait until actors have started; return what their stages are.

        Raises:
            StartError: one did not start within `cluster.start_timeout_s`, or runs another version than the driver.
        """
        described: list[Description] = await gather_ready(config, actors, "describe")
        for actor, description in zip(actors, described, strict=True):
            check_same(actor.name, description.software)
        return described

    async def _load(self, actors: list[Actor]) -> list[Actor]:
        """Load actors that have started; whatever session others know by now belongs to another process."""
        taken = await self.known_sessions() | self._driver_sessions()
        arguments = self._graph, self._driver_info.credentials, taken
        infos = await gather_ready(self.spec.config, actors, "load", *arguments)
        await asyncio.gather(*map(self._follow, actors))
        return [replace(actor, info=info) for actor, info in zip(actors, infos, strict=True)]

    async def known_sessions(self) -> frozenset[str]:
        """Return the names of all sessions that living replicas have read from: a new pool must not have one."""
        loaded = [*self._adopted, *self._serving()]
        return frozenset().union(*await asyncio.gather(*map(self._known_sessions, loaded)))

    async def _known_sessions(self, actor: Actor) -> frozenset[str]:
        try:
            names: frozenset[str] = await ask_within(self.spec.config.failures.answer_s, actor, "met")
        except (TimeoutError, DisaggError):  # it will be replaced
            return frozenset()
        return names

    async def publish(self, config: Config) -> None:
        """Have every replica keep a new spec; one that is dead is noticed elsewhere."""
        self.spec = Spec(self.spec.revision + 1, config)
        await asyncio.gather(*map(self._follow, self._serving()), return_exceptions=True)

    async def _follow(self, actor: Actor) -> None:
        """Have a replica work for this driver, and keep the spec."""
        try:
            await ask_within(FOLLOW_S, actor, "follow", self._driver_info, self.spec)
        except TimeoutError as error:
            raise ReplicaLost(str(error)) from None

    async def finish(self) -> list[Actor]:
        """Wait a while for launches that were cancelled; return the actors that do not serve."""
        if self._launching:
            await asyncio.wait(self._launching, timeout=CLOSE_S)
        return list(self._starting)

    def close(self) -> None:
        """Kill the actors that do not serve, and give the GPUs back that stages share; waits for Ray."""
        for actor in self._starting:
            actor.kill()
        self._placement.close()


def _kill_launched(launching: asyncio.Future[Actor]) -> None:
    if launching.exception() is None:
        launching.result().kill()


Found = tuple[Actor, ReplicaState | None]


async def adopt(name: str, config: Config) -> tuple[Spec, list[tuple[Actor, Description]], dict[str, int]]:
    """Find the living actors of a service, keep one for each replica, and kill those that are of no use.

    Returns:
        The latest spec that one keeps, or one of `config` at revision 0; the actors, without `info` those that have
        not been asked to load, and what their stages are; the incarnation of each replica's next actor, by name.
    """
    actors = sorted(await off_loop(find_replicas, name), key=lambda actor: actor.incarnation)
    found: list[Found] = list(zip(actors, await asyncio.gather(*map(_ask_state, actors)), strict=True))
    await off_loop(release_gangs, name, {actor.id for actor in actors})
    specs = [state.spec for _, state in found if state is not None and state.spec is not None]
    spec = max(specs, key=lambda spec: spec.revision, default=Spec(0, config))
    replicas, kept = {replica.name: replica for replica in replicas_of(spec.config)}, list[tuple[Actor, Description]]()
    for actor, state in _best_first(found, spec.config, replicas):
        if actor.name not in replicas or state is None or (state.info is None and not state.fresh):
            await off_loop(actor.kill)
            continue
        settings = without_count(state.config.stages[actor.stage])
        adopted = replace(actor, replica=replicas.pop(actor.name), settings=settings, info=state.info)
        kept.append((adopted, state.description))
    return spec, kept, {actor.name: actor.incarnation + 1 for actor in actors}


async def _ask_state(actor: Actor) -> ReplicaState | None:
    try:
        state: ReplicaState = await ask_within(STATE_S, actor, "state")
        check_same(actor.name, state.description.software)
    except (TimeoutError, DisaggError) as error:
        logger.warning("replica %s is not adopted: %s", actor.name, error)
        return None
    return state


def _best_first(found: Iterable[Found], config: Config, replicas: dict[str, ReplicaId]) -> list[Found]:
    """Sort actors, of which an interrupted rollout may leave two for a replica."""
    wanted = {name: settings_of(config, replica) for name, replica in replicas.items()}

    def rank(item: Found) -> tuple[bool, bool, int]:
        actor, state = item
        if state is None or actor.stage not in config.stages:
            return False, False, actor.incarnation
        is_current = without_count(state.config.stages[actor.stage]) == wanted.get(actor.name)
        return state.info is not None, is_current, actor.incarnation

    return sorted(found, key=rank, reverse=True)
