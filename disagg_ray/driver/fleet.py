"""The replicas of all stages: which serve, calls to them, and who starts others when they are lost or not enough."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

from disagg_ray.config.schema import Config
from disagg_ray.driver.calls import Actor, ReplicaId, ask, replicas_of
from disagg_ray.driver.launcher import Launcher
from disagg_ray.driver.metrics import Metrics
from disagg_ray.driver.outages import Outages
from disagg_ray.driver.runner import ReplicaRunner
from disagg_ray.driver.tasks import BackgroundTasks
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import DisaggError, ReplicaLost, StartError
from disagg_ray.graph import Graph
from disagg_ray.replica.messages import DriverInfo, Health, ReplicaInfo
from disagg_ray.scheduling.blame import MAX_IN_A_ROW, Ledger
from disagg_ray.scheduling.scheduler import StageScheduler

logger = logging.getLogger("disagg_ray")

CLOSE_S = 5.0
"""How long closing waits for replicas to give their pools back before it kills them."""
MAX_STARTS = 3
"""Starts of a replica in a row that may fail for its configuration or model; a service's is always tried again."""


class Fleet:
    """Owns the actors; its methods run on the driver's event loop.

    `on_lost` is called with each actor that serves no more, `on_dead` with its sessions once it is killed, `on_outage`
    with the reason when a stage has had no replica for too long, and with None once every stage has one again. Actors
    of a service are `detached`: they outlive this process and keep the service's spec for the next one.
    """

    def __init__(
        self,
        config: Config,
        pipeline_id: str,
        on_lost: Callable[[Actor], None],
        on_dead: Callable[[tuple[str, ...]], None],
        on_outage: Callable[[StartError | None], None],
        metrics: Metrics,
        *,
        detached: bool,
    ) -> None:
        self._metrics, self._on_lost, self._on_dead = metrics, on_lost, on_dead
        self.max_starts = None if detached else MAX_STARTS
        self.launcher = Launcher(config, pipeline_id, lambda: self.actors, detached=detached)
        self.schedulers = {stage: StageScheduler() for stage in config.stages}
        self._ledgers = {stage: Ledger() for stage in config.stages}
        self.num_restarts = dict.fromkeys(config.stages, 0)
        self.runners: dict[ReplicaRunner, asyncio.Task[None]] = {}
        self._serving: dict[str, ReplicaRunner] = {}
        """By their actors' ids."""
        self.held: set[ReplicaId] = set()
        """Replicas that only a rollout starts and ends."""
        self._stalled: set[str] = set()
        """Ids of actors that were replaced because they hung."""
        self._ending: list[Actor] = []
        """Actors that serve no more and are not killed yet."""
        self.outages = Outages(config.stages, on_outage)
        self._background = BackgroundTasks(metrics.task_restarted)

    @property
    def config(self) -> Config:
        """What the fleet is to be."""
        return self.launcher.spec.config

    @property
    def actors(self) -> tuple[Actor, ...]:
        """Those that serve, including those that retire."""
        return tuple(runner.actor for runner in self._serving.values() if runner.actor is not None)

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """What those that serve are, by stage and index."""
        stages = list(self.config.stages)
        serving = sorted(self.actors, key=lambda actor: (stages.index(actor.stage), actor.replica.index))
        return tuple(actor.info for actor in serving if actor.info is not None)

    @property
    def healths(self) -> dict[str, Health]:
        """The last answer of each replica that serves, by name."""
        runners = self._serving.values()
        return {runner.replica.name: runner.health for runner in runners if runner.health is not None}

    def digests_of(self, stage: str) -> dict[str, set[str]]:
        """Return the digests of a stage's serving replicas by block: several while the stage changes."""
        found: dict[str, set[str]] = {block: set() for block in self.config.stages[stage].blocks}
        for info in self.replicas:
            if info.stage == stage:
                for block, digest in info.blocks.items():
                    found.setdefault(block, set()).add(digest)
        return found

    def actor(self, actor_id: str) -> Actor:
        """Return an actor that serves.

        Raises:
            ReplicaLost: it was lost since the scheduler chose it.
        """
        if (runner := self._serving.get(actor_id)) is None or runner.actor is None:
            raise ReplicaLost(f"{actor_id} was lost before it was reached")
        return runner.actor

    def is_serving(self, actor: Actor) -> bool:
        return actor.id in self._serving

    def has_stalled(self, actor: Actor) -> bool:
        return actor.id in self._stalled

    async def load(self, graph: Graph, driver_info: DriverInfo, driver_sessions: Callable[[], frozenset[str]]) -> None:
        """Load every replica and put it into service; `driver_sessions` returns what the driver has read from."""
        for actor in await self.launcher.load(graph, driver_info, driver_sessions):
            self._keep_running(actor.replica, actor)
        self.reconcile()

    async def start(self, replica: ReplicaId, config: Config, begin_s: float | None = None) -> bool:
        """Have an actor launched with `config` serve as a replica; return False if it has not begun after `begin_s`.

        Raises:
            DisaggError: why it did not start.
        """
        if (actor := await self.launcher.start(replica, config, begin_s)) is not None:
            self._keep_running(replica, actor)
        return actor is not None

    def hold(self, replicas: Collection[ReplicaId]) -> None:
        """Leave replicas to a rollout, which alone starts and ends them from now on; what starts otherwise ends."""
        self.held.update(replicas)
        for runner in [other for other in self.runners if other.replica in replicas and other.actor is None]:
            self._abandon(runner)

    async def retire(self, runner: ReplicaRunner) -> None:
        """End a replica once it is idle, at once if it has no actor; no other actor follows."""
        if runner.actor is None:
            self._abandon(runner)
        else:
            await runner.retire()

    async def resize(self, config: Config) -> None:
        """Become what `config` says, which differs only in what may change without new replicas.

        Returns once the replicas know of it; those that are added start, and those that are not wanted retire.
        """
        for runner in self.runners:
            runner.backoff.retry_now()
        await self.launcher.publish(config)
        self.reconcile()

    def reconcile(self) -> None:
        """Start the replicas that are missing, and end those that are not wanted, unless a rollout does."""
        wanted, present = replicas_of(self.config), {runner.replica for runner in self.runners}
        for replica in wanted:
            if replica not in present | self.held:
                self._keep_running(replica)
        for runner in list(self.runners):
            if runner.is_retiring or runner.replica in wanted or runner.replica in self.held:
                continue
            if runner.actor is None:
                self._abandon(runner)
            else:
                runner.is_retiring = True
                self._spawn(runner.retire)

    def _abandon(self, runner: ReplicaRunner) -> None:
        """Forget a runner that has no actor; one that starts is killed. Idempotent."""
        if (task := self.runners.pop(runner, None)) is not None:
            task.cancel()

    def _keep_running(self, replica: ReplicaId, actor: Actor | None = None) -> None:
        """Have an actor serve as a replica, and others after it; without one start it first."""
        runner = ReplicaRunner(self, replica)
        if actor is not None:
            self.serve(runner, actor)
        self.runners[runner] = self._spawn(runner.run)

    def serve(self, runner: ReplicaRunner, actor: Actor) -> None:
        """Put an actor into service."""
        runner.serve(actor)
        self._serving[actor.id] = runner
        self._ledgers[actor.stage].add(actor.id)
        self.schedulers[actor.stage].add(actor.id, actor.replica.group, time.monotonic())
        self.outages.end(actor.stage)
        self._spawn(runner.watch, actor)

    def wants(self, runner: ReplicaRunner) -> bool:
        """Return whether a runner is to keep its replica running."""
        return not runner.is_retiring and (runner.actor is not None or runner.replica in replicas_of(self.config))

    def drop(self, runner: ReplicaRunner) -> None:
        """Forget a runner that has ended."""
        self.runners.pop(runner, None)
        if runner.is_retiring:
            self.reconcile()  # the replica may be wanted again

    def note_restart(self, stage: str) -> None:
        self.num_restarts[stage] += 1
        self._metrics.replica_restarted(stage)

    def note_success(self, actor: Actor) -> None:
        """Note that a replica computed something."""
        if (runner := self._serving.get(actor.id)) is not None:
            runner.backoff.num_failures = 0
        self._replace_broken(self._ledgers[actor.stage].succeed(actor.id))

    def note_failure(self, actor: Actor, request: str, elsewhere: AbstractSet[str], error: DisaggError) -> None:
        """Note that a living replica failed a request, which had failed at others before."""
        broken = self._ledgers[actor.stage].fail(actor.id, request, elsewhere)
        self._replace_broken(broken, f", the last with: {error}")

    def _replace_broken(self, broken: list[str], detail: str = "") -> None:
        for actor in map(self.actor, broken):
            self.replace(actor, f"{actor.name}: it failed {MAX_IN_A_ROW} requests in a row{detail}")

    async def ask(self, actor: Actor, method: str, *args: Any) -> Any:
        """Call a replica, as `calls.ask`; one that is lost is replaced."""
        try:
            return await ask(actor, method, *args)
        except ReplicaLost as error:
            self.replace(actor, str(error))
            raise

    def send(self, actor: Actor, method: str, *args: Any) -> None:
        """Call a replica that serves, without waiting for its answer."""
        if self.is_serving(actor):
            self._spawn(self._send, actor, method, *args)

    async def _send(self, actor: Actor, method: str, *args: Any) -> None:
        with suppress(DisaggError):
            await self.ask(actor, method, *args)

    def replace(self, actor: Actor, reason: str, *, is_stalled: bool = False) -> None:
        """Take an actor out of service; another is started. Idempotent."""
        if not self.is_serving(actor):
            return
        logger.warning("replica lost: %s; it is replaced", reason)
        if is_stalled:
            self._stalled.add(actor.id)
        if not self._ledgers[actor.stage].is_fruitful(actor.id):
            self._serving[actor.id].backoff.num_failures += 1
        self.remove(actor)

    def remove(self, actor: Actor) -> None:
        """End an actor; what it holds is lost. Idempotent."""
        if (runner := self._serving.pop(actor.id, None)) is None or (info := actor.info) is None:
            return
        self._ledgers[actor.stage].remove(actor.id)
        self.schedulers[actor.stage].remove(actor.id, time.monotonic())
        if not self.schedulers[actor.stage].replicas:
            self.outages.begin(actor.stage)
            self._spawn(self.outages.limit, actor.stage, self.config.cluster.start_timeout_s)
        runner.end()
        self._on_lost(actor)
        self._ending.append(actor)
        self._spawn(self._end, actor, info.sessions)

    async def _end(self, actor: Actor, sessions: tuple[str, ...]) -> None:
        """Kill an actor; then free the memory, here and in other replicas, that it might still have written to."""
        await off_loop(actor.kill)  # waits for Ray; tried again where that fails
        self._ending.remove(actor)
        self._on_dead(sessions)
        for other in self.actors:
            self.send(other, "forget", sessions)

    def count(self) -> None:
        """Update the metrics of how many replicas serve and start, their health, and how many jobs wait for one."""
        for actor in self.actors:
            if (health := self.healths.get(actor.name)) is not None:
                self._metrics.replica_health(actor.stage, actor.name, health)
        for stage, scheduler in self.schedulers.items():
            self._metrics.replicas(stage, len(scheduler.replicas), self.launcher.num_starting(stage))
            self._metrics.queue_depth(stage, scheduler.num_waiting)

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> asyncio.Task[None]:
        return self._background.start(f"fleet_{work.__name__.lstrip('_')}", work, *args)

    async def close(self) -> None:
        """Have every replica give its pool back, for a while, then kill it."""
        await self._background.close()
        actors = [*self.actors, *await self.launcher.finish()]
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await asyncio.gather(*(ask(actor, "close") for actor in actors), return_exceptions=True)
        await asyncio.wait([asyncio.ensure_future(off_loop(self.kill))], timeout=CLOSE_S)

    def kill(self) -> None:
        """Kill every replica; waits for Ray."""
        for actor in (*self.actors, *self._ending):
            actor.kill()
        self.launcher.close()
