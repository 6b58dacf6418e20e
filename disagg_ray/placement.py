"""Where replicas run: the cluster, the actors, and waiting that can be seen."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle

from disagg_ray import environment
from disagg_ray.config import Config, StageConfig
from disagg_ray.errors import ConfigError, DisaggError, StageError, StartError
from disagg_ray.replica import Replica

logger = logging.getLogger("disagg_ray")

GROUPS = {"compute": 1, "pull": 1, "control": 2}
"""Threads of each kind in a replica."""
GROUP_OF = {"run": "compute", "load": "compute", "prefetch": "pull"}
"""Every other call is a control call."""
NOTICE_S = 10.0
"""How often a wait says what it waits for."""


@dataclass(frozen=True)
class Actor:
    """A launched replica."""

    stage: str
    name: str
    handle: ActorHandle[Any]

    def call(self, method: str, *args: Any, about: str = "") -> Awaitable[Any]:
        """Call a method; `about` names the request in the dashboard's task list."""
        title = " ".join(part for part in (self.name, method, about) if part)
        bound = getattr(self.handle, method)
        return bound.options(name=title, concurrency_group=GROUP_OF.get(method, "control")).remote(*args)  # type: ignore[no-any-return]


class Cluster:
    """A Ray cluster that was joined, or started and then shut down again."""

    def __init__(self, config: Config) -> None:
        self._started = False
        self._auth_mode = environment.ray_auth_mode()
        if ray.is_initialized():
            return
        address = config.cluster.address or environment.ray_address()
        if address is not None:
            self._join(address)
        else:
            self._start(config)

    def _join(self, address: str) -> None:
        try:
            ray.init(address=address, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise StartError(f"cluster.address: {address!r} cannot be joined: {reason}") from error

    def _start(self, config: Config) -> None:
        """Start one on this machine, reachable with a token only."""
        _make_token()
        cpus = sum(stage.num_cpus * stage.replicas for stage in config.stages.values())
        ray.init(
            address="local",
            num_cpus=max(psutil.cpu_count() or 1, int(cpus) + 1),  # CPUs are bookkeeping: let the stages share cores
            num_gpus=config.cluster.num_gpus,
            include_dashboard=config.cluster.dashboard,
            logging_level=logging.ERROR,
        )
        self._started = True
        try:
            _check_gpus(config, ray.cluster_resources().get("GPU", 0))
        except DisaggError:
            self.close()
            raise

    def close(self) -> None:
        if self._started:
            ray.shutdown()
            environment.replace("RAY_AUTH_MODE", self._auth_mode)
            self._started = False


def _check_gpus(config: Config, available: float) -> None:
    asked = sum(stage.num_gpus * stage.replicas for stage in config.stages.values())
    if asked > available:
        by_stage = ", ".join(f"{name} {s.replicas} x {s.num_gpus:g}" for name, s in config.stages.items())
        raise ConfigError(
            f"stages.*.num_gpus: {asked:g} GPUs are asked for ({by_stage}) and this machine has {available:g}; "
            f"lower num_gpus or replicas, or join a cluster with cluster.address"
        )


def _make_token() -> None:
    """Write Ray's token so that only its owner can read it; Ray itself would leave it open to all users."""
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    path.chmod(0o600)


def launch(config: Config, pipeline_id: str) -> list[Actor]:
    """Create every replica of every stage; they begin to start side by side."""
    actors = []
    for stage, settings in config.stages.items():
        actor_class: Any = ray.remote(**_options(settings))(type(stage.capitalize(), (Replica,), {}))
        for index in range(settings.replicas):
            name = f"{stage}-{index}"
            handle = actor_class.options(name=f"disagg_ray-{pipeline_id}-{name}").remote(stage, index, config)
            actors.append(Actor(stage, name, handle))
    return actors


def _options(settings: StageConfig) -> dict[str, Any]:
    return {
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        "max_restarts": 0,
        "max_task_retries": 0,  # a retry by Ray would run against memory that is gone
        "concurrency_groups": GROUPS,
    }


async def gather_ready(config: Config, actors: Sequence[Actor], method: str, *args: Any) -> list[Any]:
    """Call every replica and wait until all have answered; say every few seconds what is missing.

    Raises:
        StartError: not all had by `cluster.start_timeout_s`.
        DisaggError: what a replica raised.
    """
    deadline = time.monotonic() + config.cluster.start_timeout_s
    calls = {actor.name: asyncio.ensure_future(ask(actor, method, *args)) for actor in actors}
    try:
        while missing := sorted(name for name, call in calls.items() if not call.done()):
            left = deadline - time.monotonic()
            if left <= 0:
                raise StartError(f"{_waiting_for(config, missing)}: not ready within cluster.start_timeout_s")
            pending = [calls[name] for name in missing]
            done, _ = await asyncio.wait(pending, timeout=min(NOTICE_S, left), return_when=asyncio.FIRST_EXCEPTION)
            for call in done:
                call.result()
            if not done:
                logger.info(_waiting_for(config, missing))
        return [calls[actor.name].result() for actor in actors]
    finally:
        for call in calls.values():
            call.cancel()


async def ask(actor: Actor, method: str, *args: Any, about: str = "") -> Any:
    """Call a replica and await its answer, its errors made ours."""
    try:
        return await actor.call(method, *args, about=about)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, DisaggError):
            raise cause from None
        raise StageError(f"{actor.name}: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise StageError(f"{actor.name}: the replica died or cannot be reached: {reason}") from error


def _waiting_for(config: Config, missing: Sequence[str]) -> str:
    asked: Mapping[str, float] = {
        "CPU": sum(s.num_cpus * s.replicas for s in config.stages.values()),
        "GPU": sum(s.num_gpus * s.replicas for s in config.stages.values()),
    }
    free = ray.available_resources()
    shares = ", ".join(
        f"{kind} {number:g} (free now {free.get(kind, 0):g})" for kind, number in asked.items() if number
    )
    return f"waiting for {', '.join(missing)}; the pipeline asks for {shares}"
