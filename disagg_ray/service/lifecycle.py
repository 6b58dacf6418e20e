"""Services deployed, listed, changed and taken down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle

from disagg_ray.config.schema import Config
from disagg_ray.driver.calls import NOTICE_S, Actor, ask_within, gather_ready, replicas_of
from disagg_ray.driver.launcher import STATE_S
from disagg_ray.driver.names import (
    NAMESPACE,
    check_name,
    find_replicas,
    find_supervisor,
    incomplete_services,
    release_groups,
    services,
    supervisor_name,
)
from disagg_ray.driver.placement import Placement
from disagg_ray.errors import ConfigError, DisaggError, InputError, StartError
from disagg_ray.replica.messages import ReplicaState
from disagg_ray.service.changes import check_change
from disagg_ray.service.latents_store import LatentsStore
from disagg_ray.service.protocol import Snapshot
from disagg_ray.service.stub import ANSWER_S, take_snapshot, value_of
from disagg_ray.service.supervisor import Supervisor

logger = logging.getLogger("disagg_ray")

LOOK_S = 1.0
"""How often the status of a rollout is fetched."""
END_S = 60.0
"""How long taking down may take, beyond what running requests get."""
MAX_CALLS = 2**30
"""Calls that a supervisor answers at once: each waiting request is one, and heartbeats never wait behind them."""


def up(name: str, config: Config) -> Snapshot:
    """Deploy a service and wait until it is ready; change one that runs to `config`, or leave it as it was.

    Raises:
        InputError: the name is invalid, or the service of this name has another graph or model.
        DisaggError: why a replica did not start; of a new service nothing is left.
    """
    if check_name(name) in services():
        _roll_out(name, config)
        return take_snapshot(name)
    if find_replicas(name):
        raise InputError(f"NAME: {name!r} has stages that were started one by one; start the others with --only, "
                         f"or take it down first")  # fmt: skip
    return _launch(name, config)


def _roll_out(name: str, config: Config) -> None:
    """Wait for the end of a rollout, however long requests keep the old replicas; log what it does."""
    reported = ""

    def report() -> None:
        nonlocal reported
        with suppress(DisaggError):  # it died: the answer says so
            if (status := take_snapshot(name).rollout) not in ("", reported):
                logger.info("%s: %s", name, reported := status)

    try:
        _wait(find_supervisor(name).change.remote(config), LOOK_S, report)
    except DisaggError as error:
        kind = ConfigError if isinstance(error, InputError) else StartError
        raise kind(f"{name} stays as it was: {error}") from error


def _wait(answer: Any, every_s: float, report: Callable[[], None]) -> None:
    """Wait for a supervisor's answer, and report again and again that it is not there.

    Raises:
        DisaggError: the answer is that error, or the supervisor died.
    """
    while not ray.wait([answer], timeout=every_s)[0]:
        report()
    value_of(answer)


def _launch(name: str, config: Config, *, join: bool = False) -> Snapshot:
    """Deploy a service; with `join`, wait for the one of this name that another process has just deployed."""
    options: dict[str, Any] = {
        "name": supervisor_name(name), "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0,
        "max_restarts": -1, "max_task_retries": 0, "max_concurrency": MAX_CALLS,
        "get_if_exists": join,
    }  # fmt: skip
    deadline = time.monotonic() + config.cluster.start_timeout_s

    def report() -> None:
        logger.info("waiting for the replicas of %s", name)
        if time.monotonic() > deadline:
            raise StartError(f"{name}: not ready within cluster.start_timeout_s")

    try:
        supervisor: Any = ray.remote(Supervisor).options(**options).remote(name, config)
    except ValueError as error:
        raise InputError(f"NAME: {name!r} was taken meanwhile") from error
    try:
        _wait(supervisor.ready.remote(), NOTICE_S, report)
        return take_snapshot(name)
    except BaseException:
        _wipe(name, supervisor)
        raise


def up_stage(name: str, stage: str, config: Config, *, here: bool) -> Snapshot | None:
    """Start one stage; once all have been started, deploy the service of them and return its state.

    Raises:
        InputError: no such stage, it was started already, or others were started for another model.
    """
    if stage not in config.stages:
        raise InputError(f"--only: no stage {stage!r}; there are {', '.join(config.stages)}")
    if check_name(name) in services():
        raise InputError(f"NAME: {name!r} runs already; change its replicas with `disagg-ray scale`")
    if here:
        settings = config.stages[stage]
        label = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        pinned = replace(settings, label_selector=settings.label_selector | label)
        config = replace(config, stages=config.stages | {stage: pinned})
    found = asyncio.run(_start_stage(name, stage, config))
    if missing := [other for other in config.stages if other not in found]:
        logger.info("%s: %s is started; still missing: %s", name, stage, ", ".join(missing))
        return None
    stages = {name: found[name].stages[name] for name in config.stages}
    return _launch(name, replace(config, stages=stages), join=True)


async def _start_stage(name: str, stage: str, config: Config) -> dict[str, Config]:
    """Start a stage's replicas; return the configuration with which each stage was started."""
    placement = Placement(name, detached=True)
    others = find_replicas(name)
    if any(other.stage == stage for other in others):
        raise InputError(f"--only: {stage} was started already")
    found = await _configs_of(others, config)
    actors: list[Actor] = []
    try:
        placement.reserve(config)
        actors.extend(placement.launch(config, replica) for replica in replicas_of(config) if replica.stage == stage)
        await gather_ready(config, actors, "describe")
        found |= await _configs_of(find_replicas(name), config)  # others may have been started meanwhile
    except BaseException:
        for actor in actors:
            actor.kill()
        if not others:
            release_groups(name)
        raise
    return found | {stage: config}


async def _configs_of(actors: list[Actor], config: Config) -> dict[str, Config]:
    """Return with what each stage was started, by name; of those whose replicas have begun and answer.

    Raises:
        ConfigError: one was started for another model or service; names the key.
    """
    asked = (ask_within(STATE_S, actor, "state") for actor in actors)
    states: list[ReplicaState | BaseException] = await asyncio.gather(*asked, return_exceptions=True)
    answers = zip(actors, states, strict=True)
    known = {actor.stage: state.config for actor, state in answers if isinstance(state, ReplicaState)}
    for other in known.values():
        check_change(replace(other, stages=config.stages), config)
    return known


def list_all() -> dict[str, Snapshot | str]:
    """Return the state of each service, by name; a few words where no supervisor answers."""
    calls: dict[str, Any] = {}
    for name in services():
        with suppress(InputError):  # taken down meanwhile
            calls[name] = find_supervisor(name).snapshot.remote()
    deadline, answers = time.monotonic() + ANSWER_S, dict[str, Snapshot | str]()
    for name, answer in calls.items():
        try:
            answers[name] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.RayError:
            answers[name] = "restarting"
    return answers | {name: f"incomplete: {', '.join(replicas)}" for name, replicas in incomplete_services().items()}


def scale(name: str, stage: str, replicas: int) -> None:
    """Change how many replicas a stage of a service is to have; return before they start or end.

    Raises:
        InputError: no such service or stage, or an invalid number.
    """
    call: Any = find_supervisor(name).scale.remote(stage, replicas)
    _wait(call, NOTICE_S, lambda: logger.info("waiting for an earlier change of %s", name))


def down(name: str, grace_s: float) -> None:
    """Take a service down after giving running requests `grace_s` seconds; nothing is left.

    Raises:
        InputError: no service has this name.
    """
    if check_name(name) not in services() and find_replicas(name):
        _wipe(name, None)
        return
    supervisor = find_supervisor(name)
    try:
        ray.get(supervisor.end.remote(grace_s), timeout=grace_s + END_S)
    except ray.exceptions.RayError as error:
        logger.warning("%s did not end by itself: %s", name, str(error).strip().splitlines()[0])
    _wipe(name, supervisor)


def _wipe(name: str, supervisor: ActorHandle[Any] | None) -> None:
    """End every actor of a service, the supervisor first, and wait until they are gone."""
    if supervisor is not None:
        ray.kill(supervisor, no_restart=True)
    deadline = time.monotonic() + END_S
    while name in services() or find_replicas(name):
        for actor in find_replicas(name):
            actor.kill()
        if time.monotonic() > deadline:
            raise StartError(f"{name}: its actors did not end within {END_S:g} s")
        time.sleep(0.1)
    release_groups(name)
    LatentsStore(name, 0, 0).clear()
