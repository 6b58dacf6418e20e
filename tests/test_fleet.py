"""A fleet whose replicas live in this process: what becomes of it where calls fail and ends cross."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray

from disagg_ray import load_config
from disagg_ray.config.schema import Config
from disagg_ray.driver import calls, runner, tasks
from disagg_ray.driver.calls import Actor, ReplicaId
from disagg_ray.driver.fleet import Fleet
from disagg_ray.driver.metrics import Metrics
from disagg_ray.driver.placement import settings_of
from disagg_ray.graph import Graph, StagePorts
from disagg_ray.models.geometry import Geometry
from disagg_ray.replica.messages import Description, DriverInfo, Health, RankMemory, ReplicaInfo
from disagg_ray.replica.software import software
from disagg_ray.service.rollout import Rollouts

T2V = "conf/tiny_t2v.yaml"
GROWING = "service.cluster_grows=true"
"""So that no Ray is asked for room."""
MEMORY = "stages.transformer.memory=1048576"
SOON_S = 60.0

Behave = Callable[[Actor, str], Awaitable[None]]
End = Callable[[str], None]


@dataclass(frozen=True)
class LocalActor(Actor):
    """Answers at once what a sound replica answers, after `behave` for it and the method."""

    behave: Behave | None = field(default=None, compare=False)
    end: End = field(default=lambda _: None, compare=False)

    def kill(self) -> None:
        self.end(self.id)

    async def call(self, method: str, *args: Any) -> Any:
        assert self.behave is not None
        await self.behave(self, method)
        name, stage = self.name, self.stage
        if method == "describe":
            return Description(StagePorts(stage, *(frozenset[str](),) * 3), Geometry.__new__(Geometry), software())
        if method == "load":
            return ReplicaInfo(name, stage, "", 0, "cpu", 0, 0, {}, (f"session of {self.id}",), 0.0, 0.0, {})
        if method == "health":
            return Health(0, 0, 0, {}, 0, 0, 0, (RankMemory(0, 0),), 0)
        return frozenset() if method == "met" else None


@dataclass
class LocalPlacement:
    behave: Behave
    end: End = lambda _: None

    def reserve(self, config: Config) -> None:
        pass

    def launch(self, config: Config, replica: ReplicaId, incarnation: int) -> Actor:
        settings = settings_of(config, replica)
        handle: Any = None
        return LocalActor(replica, incarnation, handle, settings, behave=self.behave, end=self.end)

    def close(self) -> None:
        pass


@asynccontextmanager
async def serving(config: Config, placement: LocalPlacement) -> AsyncIterator[Fleet]:
    fleet = Fleet(config, "local", *[lambda _: None] * 3, Metrics("tiny", config.stages), detached=False)
    fleet.launcher._placement = placement  # type: ignore[assignment]
    try:
        await fleet.launcher.launch()
        await fleet.load(Graph((), (), (), ""), DriverInfo("epoch", (), None), frozenset)
        yield fleet
    finally:
        await fleet.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.01)


def find(fleet: Fleet, name: str) -> Actor:
    (actor,) = [actor for actor in fleet.actors if actor.name == name]
    return actor


async def at_once(actor: Actor, method: str) -> None:
    """Behave as a replica that does nothing before it answers."""


def test_the_others_are_served_while_ray_does_not_end_a_lost_replica() -> None:
    may_end, ended = threading.Event(), list[str]()

    def hang(actor_id: str) -> None:
        assert may_end.wait(SOON_S)
        ended.append(actor_id)

    async def run() -> None:
        async with serving(load_config(T2V), LocalPlacement(at_once, hang)) as fleet, asyncio.timeout(SOON_S):
            fleet.replace(lost := find(fleet, "decoder-0"), "it hangs")
            await until(lambda: len(fleet.actors) == 3)
            assert find(fleet, "decoder-0") != lost
            assert not ended
            may_end.set()
            await until(lambda: ended == ["decoder-0.0"])

    asyncio.run(run())


def test_a_lost_replica_that_ray_fails_to_end_is_replaced_and_ended_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FIRST_PAUSE_S", 0.01)
    errors, ended = [ray.exceptions.RaySystemError("no GCS")], list[str]()

    def fail_once(actor_id: str) -> None:
        if errors:
            raise errors.pop()
        ended.append(actor_id)

    async def run() -> None:
        async with serving(load_config(T2V), LocalPlacement(at_once, fail_once)) as fleet, asyncio.timeout(SOON_S):
            fleet.replace(find(fleet, "decoder-0"), "it died")
            await until(lambda: len(fleet.actors) == 3 and ended == ["decoder-0.0"])

    asyncio.run(run())


def test_a_lost_replica_is_ended_even_if_the_fleet_closes_at_once() -> None:
    ended = list[str]()

    async def run() -> None:
        async with serving(load_config(T2V), LocalPlacement(at_once, ended.append)) as fleet:
            fleet.replace(find(fleet, "decoder-0"), "it died")

    asyncio.run(run())
    assert {"decoder-0.0", "encoder-0.0", "transformer-0.0"} <= set(ended)


def test_a_driver_that_was_stopped_for_a_while_does_not_take_a_sound_replica_for_hung() -> None:
    asked = list[str]()

    async def stop_once(actor: Actor, method: str) -> None:
        if (actor.name, method) == ("decoder-0", "health"):
            asked.append(actor.id)
            if len(asked) == 1:
                time.sleep(1.5)  # as a process that was sent SIGSTOP and SIGCONT
                await asyncio.sleep(0.01)  # until the answer, which came meanwhile, is read

    async def run() -> None:
        config = load_config(T2V, "failures.answer_s=1")
        async with serving(config, LocalPlacement(stop_once)), asyncio.timeout(SOON_S):
            await until(lambda: len(asked) > 1)
            assert set(asked) == {"decoder-0.0"}

    asyncio.run(run())


def test_a_replica_that_cannot_be_told_to_release_a_slot_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "AGAIN_S", (0.01, 0.01))

    async def lose_releases(actor: Actor, method: str) -> None:
        if method == "release":
            raise ray.exceptions.ActorUnavailableError("the link is down", None)

    async def run() -> None:
        async with serving(load_config(T2V), LocalPlacement(lose_releases)) as fleet, asyncio.timeout(SOON_S):
            fleet.send(kept := find(fleet, "decoder-0"), "release", None)
            await until(lambda: not fleet.is_serving(kept) and len(fleet.actors) == 3)

    asyncio.run(run())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replica_that_dies_while_its_successor_starts_is_not_there_twice(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LOOK_S", 0.01)
    before, after = load_config(T2V, GROWING), load_config(T2V, GROWING, MEMORY)

    async def run() -> None:
        starts, may_start, again, may_return = (asyncio.Event() for _ in range(4))

        async def hold(actor: Actor, method: str) -> None:
            if method == "load" and actor.settings and actor.settings.memory:
                starts.set()
                await may_start.wait()
            elif method == "load" and actor.incarnation:
                again.set()
                await may_return.wait()

        async with serving(before, LocalPlacement(hold)) as fleet, asyncio.timeout(SOON_S):
            rollouts = Rollouts(fleet)
            rolling = asyncio.ensure_future(rollouts.roll_out(after))
            await starts.wait()
            fleet.replace(find(fleet, "transformer-0"), "it died")
            await again.wait()
            if when == "before":
                may_return.set()
                await until(lambda: len(fleet.actors) == 3)
            may_start.set()
            await rolling
            may_return.set()
            settling = asyncio.ensure_future(rollouts.settle())
            await asyncio.sleep(0.5)  # what comes too often comes by then
            await until(lambda: sorted(each.replica.stage for each in fleet.runners) == sorted(before.stages))
            assert find(fleet, "transformer-0").settings == settings_of(after, find(fleet, "transformer-0").replica)
            settling.cancel()

    asyncio.run(run())
