"""A deployment's replicas, the actors that run them, and calls to them whose errors become ours."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group

from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.driver.cluster import total_resources
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import DisaggError, ReplicaLost, StageError, StartError
from disagg_ray.replica.messages import ReplicaInfo

logger = logging.getLogger("disagg_ray")

GROUPS = {"compute": 1, "pull": 2, "encode": 1, "control": 2}
"""Threads of each kind in a replica."""

GROUP_OF = {"run": "compute", "load": "compute", "prefetch": "pull", "encode": "encode"}
"""Every other call is a control call."""

AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses before a replica that cannot be reached is called again; after the last it is lost."""

LOOKS = 4
"""Parts of the time that an answer may take."""

NOTICE_S = 10.0
"""How often a wait says what it waits for."""


@dataclass(frozen=True)
class ReplicaId:
    """A replica of a deployment, which one actor after another runs."""

    stage: str
    index: int
    group: str

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.index}"


def replicas_of(config: Config) -> list[ReplicaId]:
    """Return a deployment's replicas, stage by stage."""
    return [
        ReplicaId(stage, index, group)
        for stage, settings in config.stages.items()
        for index, group in enumerate(
            name for name, group in settings.replica_groups.items() for _ in range(group.replicas)
        )
    ]


@dataclass(frozen=True)
class Actor:
    """A process that runs a replica."""

    replica: ReplicaId
    incarnation: int
    """How many actors ran the replica before."""
    handle: ActorHandle[Any]
    settings: StageConfig | None = field(default=None, compare=False)
    """What it was launched with (`placement.settings_of`); None: not known."""
    info: ReplicaInfo | None = field(default=None, compare=False)
    """None: it is not loaded."""
    bundles: PlacementGroup | None = field(default=None, compare=False)
    """Of its ranks, where they are several: theirs alone, so that it ends with the actor."""

    @property
    def stage(self) -> str:
        return self.replica.stage

    @property
    def name(self) -> str:
        return self.replica.name

    @property
    def id(self) -> str:
        """Distinguishes the actors of one replica."""
        return f"{self.name}.{self.incarnation}"

    @property
    def num_ranks(self) -> int:
        return max(1, len(self.info.ranks)) if self.info is not None else 1

    @property
    def num_gpus(self) -> float:
        """GPUs that all its ranks have reserved."""
        return self.num_ranks * self.settings.num_gpus if self.settings is not None else 0.0

    def kill(self) -> None:
        """End the process, and those of its other ranks; after the cluster was left, do nothing."""
        if ray.is_initialized():
            ray.kill(self.handle, no_restart=True)
            if self.bundles is not None:
                remove_placement_group(self.bundles)

    def call(self, method: str, *args: Any) -> Awaitable[Any]:
        """Call a method, under a title for Ray's dashboard.

        Titles name no request: Ray keeps each forever, with tens of kilobytes of the driver's and a metrics series.
        """
        if not ray.is_initialized():  # Ray would start a cluster
            raise ReplicaLost(f"{self.name}: the cluster was left")
        title = f"{self.name} {method}"
        bound = getattr(self.handle, method)
        return bound.options(name=title, concurrency_group=GROUP_OF.get(method, "control")).remote(*args)  # type: ignore[no-any-return]


async def gather_ready(config: Config, actors: Sequence[Actor], method: str, *args: Any) -> list[Any]:
    """Call every actor and wait until all have answered; log every few seconds what is missing.

    Raises:
        StartError: not all had answered within `cluster.start_timeout_s`.
        DisaggError: what a replica raised.
    """
    deadline = time.monotonic() + config.cluster.start_timeout_s
    calls = {actor.name: asyncio.ensure_future(ask(actor, method, *args)) for actor in actors}
    try:
        while missing := sorted(name for name, call in calls.items() if not call.done()):
            left = deadline - time.monotonic()
            if left <= 0:
                waiting = await off_loop(_describe_wait, config, missing)
                raise StartError(f"{waiting}: not ready within cluster.start_timeout_s")
            pending = [calls[name] for name in missing]
            done, _ = await asyncio.wait(pending, timeout=min(NOTICE_S, left), return_when=asyncio.FIRST_EXCEPTION)
            for call in done:
                call.result()
            if not done:
                logger.info(await off_loop(_describe_wait, config, missing))
        return [calls[actor.name].result() for actor in actors]
    finally:
        for call in calls.values():
            call.cancel()


async def ask(actor: Actor, method: str, *args: Any) -> Any:
    """Call an actor and await its answer; raise its errors as ours.

    One that cannot be reached is called again for a while: it may have done what was asked, and does it once.

    Raises:
        ReplicaLost: it died or cannot be reached; it may have done what was asked or not.
        DisaggError: what it raised.
    """
    for pause_s in (*AGAIN_S, None):
        try:
            return unwrap(await actor.call(method, *args))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, DisaggError):
                raise cause from None
            raise StageError(f"{actor.name}: {type(cause).__name__}: {cause}") from error
        except ray.exceptions.ActorUnavailableError as error:
            if pause_s is None:  # its node may be gone, and with it everyone who would report that
                reason = f"{actor.name}: the replica cannot be reached: {_reason(error)}"
                raise ReplicaLost(reason, with_node=True) from error
            logger.info("%s cannot be reached; it is called again: %s", actor.name, _reason(error))
            await asyncio.sleep(pause_s)
        except ray.exceptions.RayError as error:
            reason = _reason(error)
            with_node = "node has died" in reason or getattr(error, "preempted", False)
            raise ReplicaLost(f"{actor.name}: the replica died: {reason}", with_node=with_node) from error
    raise AssertionError("unreachable")


async def ask_within(timeout_s: float, actor: Actor, method: str, *args: Any) -> Any:
    """Call an actor, as `ask`, and wait at most `timeout_s` seconds for its answer.

    However long this process itself is stopped meanwhile, as by SIGSTOP, that counts as one look at most: an answer
    that has come by then is taken.

    Raises:
        TimeoutError: no answer by then.
    """
    call = asyncio.ensure_future(ask(actor, method, *args))
    try:
        for _ in range(LOOKS):
            await asyncio.wait([call], timeout=timeout_s / LOOKS)
            if call.done():
                return call.result()
        raise TimeoutError(f"{actor.name}: no answer for {timeout_s:g} s")
    finally:
        call.cancel()


def unwrap(answer: Any) -> Any:
    """Return an actor's answer.

    Raises:
        DisaggError: the answer is that error.
    """
    if isinstance(answer, DisaggError):
        raise answer
    return answer


def _reason(error: ray.exceptions.RayError) -> str:
    """Return the line of Ray's message that says why."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if lines and "creation task" in lines[0]:
        return lines[-1]  # what the constructor raised
    return next((line for line in lines if "because" in line), lines[0] if lines else type(error).__name__)


def _describe_wait(config: Config, missing: Sequence[str]) -> str:
    free = ray.available_resources()
    shares = ", ".join(
        f"{kind} {number:g} ({free.get(kind, 0):g} more free)"
        for kind, number in total_resources(config.stages).items()
        if number
    )
    return f"waiting for {', '.join(missing)}; the pipeline takes {shares}"
