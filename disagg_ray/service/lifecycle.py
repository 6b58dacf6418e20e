"""Pipelines put up, listed, changed and taken down."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle

from disagg_ray.config.schema import Config
from disagg_ray.driver.calls import NOTICE_S, gather_ready
from disagg_ray.driver.names import (
    NAMESPACE,
    check_name,
    find_replicas,
    find_supervisor,
    gathering,
    release_groups,
    services,
    supervisor_name,
)
from disagg_ray.driver.placement import Placement, living
from disagg_ray.errors import ConfigError, DisaggError, InputError, StartError
from disagg_ray.replica.messages import ReplicaState
from disagg_ray.service.changes import check_change
from disagg_ray.service.client import ANSWER_S, take_snapshot
from disagg_ray.service.latents_store import LatentsStore
from disagg_ray.service.protocol import Snapshot
from disagg_ray.service.supervisor import Supervisor

logger = logging.getLogger("disagg_ray")

LOOK_S = 1.0
"""How often a rollout is looked at."""
END_S = 60.0
"""How long taking down may take, beyond what running requests get."""
MAX_CALLS = 10_000
"""Calls that a supervisor answers at once: each waiting request is one."""


def up(name: str, config: Config) -> Snapshot:
    """Put a pipeline up and wait until it is ready; one that stands becomes what `config` says, or stays as it was.

    Raises:
        InputError: the name is not possible, or a pipeline of this name has another graph or model.
        DisaggError: why a replica did not start; of a new pipeline nothing is left.
    """
    if check_name(name) in services():
        _roll_out(name, config)
        return take_snapshot(name)
    if find_replicas(name):
        raise InputError(f"NAME: {name!r} has stages that were started one by one; go on with --only, or take it down")
    return _launch(name, config)


def _roll_out(name: str, config: Config) -> None:
    """Wait for the end of a rollout, however long requests keep the old replicas; say what it does."""
    answer: Any = find_supervisor(name).change.remote(config)
    said = ""
    while not ray.wait([answer], timeout=LOOK_S)[0]:
        with suppress(DisaggError):  # it died: so says the answer
            if (doing := take_snapshot(name).rollout) not in ("", said):
                logger.info("%s: %s", name, said := doing)
    try:
        _told(answer, 0)
    except DisaggError as error:
        kind = ConfigError if isinstance(error, InputError) else StartError
        raise kind(f"{name} stays as it was: {error}") from error


def _launch(name: str, config: Config) -> Snapshot:
    options: dict[str, Any] = {
        "name": supervisor_name(name), "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0,
        "max_restarts": -1, "max_task_retries": 0, "max_concurrency": MAX_CALLS,
    }  # fmt: skip
    try:
        supervisor: Any = ray.remote(Supervisor).options(**options).remote(name, config)
    except ValueError as error:
        raise InputError(f"NAME: {name!r} was taken meanwhile") from error
    try:
        _wait_until_ready(name, supervisor, config)
        return take_snapshot(name)
    except BaseException:
        _wipe(name, supervisor)
        raise


def _wait_until_ready(name: str, supervisor: ActorHandle[Any], config: Config) -> None:
    deadline = time.monotonic() + config.cluster.start_timeout_s
    answer: Any = supervisor.ready.remote()
    while not ray.wait([answer], timeout=NOTICE_S)[0]:
        logger.info("waiting for the replicas of %s", name)
        if time.monotonic() > deadline:
            raise StartError(f"{name}: not ready within cluster.start_timeout_s")
    _told(answer, 0)


def up_stage(name: str, stage: str, config: Config, *, here: bool) -> Snapshot | None:
    """Start one stage; once all are there, put the pipeline up of them and return how it is.

    Raises:
        InputError: there is no such stage, it is there already, or others were started for another model.
    """
    if stage not in config.stages:
        raise InputError(f"--only: no stage {stage!r}; there are {', '.join(config.stages)}")
    if check_name(name) in services():
        raise InputError(f"NAME: {name!r} stands already; `disagg-ray scale` changes how many replicas it has")
    if here:
        settings = config.stages[stage]
        label = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        pinned = replace(settings, label_selector=settings.label_selector | label)
        config = replace(config, stages=config.stages | {stage: pinned})
    found = asyncio.run(_gathered(name, stage, config))
    if missing := [other for other in config.stages if other not in found]:
        logger.info("%s: %s is there; still missing: %s", name, stage, ", ".join(missing))
        return None
    return _launch(name, replace(config, stages={name: found[name].stages[name] for name in config.stages}))


async def _gathered(name: str, stage: str, config: Config) -> dict[str, Config]:
    """Start a stage's replicas; return with which configuration each stage was started."""
    placement = Placement(config, name, standing=True)
    there = living(name)
    told: list[ReplicaState] = await gather_ready(config, there, "state")
    found = {actor.stage: states.config for actor, states in zip(there, told, strict=True)}
    if stage in found:
        raise InputError(f"--only: {stage} was started already")
    for other in found.values():
        check_change(replace(other, stages=config.stages), config)
    placement.reserve()
    actors = [placement.launch(post) for post in placement.posts() if post.stage == stage]
    try:
        await gather_ready(config, actors, "describe")
    except BaseException:
        for actor in actors:
            ray.kill(actor.handle)
        if not there:
            release_groups(name)
        raise
    return found | {stage: config}


def list_all() -> dict[str, Snapshot | str]:
    """Return how each pipeline is, by name; of one without a supervisor that answers, in a word or two."""
    asked: dict[str, Any] = {}
    for name in services():
        try:
            asked[name] = find_supervisor(name).snapshot.remote()
        except InputError:  # taken down meanwhile
            continue
    deadline, answers = time.monotonic() + ANSWER_S, dict[str, Snapshot | str]()
    for name, answer in asked.items():
        try:
            answers[name] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.RayError:
            answers[name] = "restarting"
    return answers | {name: f"gathering: {', '.join(posts)}" for name, posts in gathering().items()}


def scale(name: str, stage: str, replicas: int) -> None:
    """Have a stage of a service get so many replicas; returns at once.

    Raises:
        InputError: there is no such pipeline or stage, or it cannot have so many.
    """
    answer: Any = find_supervisor(name).scale.remote(stage, replicas)
    while not ray.wait([answer], timeout=NOTICE_S)[0]:
        logger.info("waiting for the change of %s that is under way", name)
    _told(answer, 0)


def down(name: str, grace_s: float) -> None:
    """Take a pipeline down, having given what runs so many seconds; nothing is left.

    Raises:
        InputError: no such pipeline stands.
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
    """End every actor of a pipeline, the supervisor first, and wait until they are gone."""
    if supervisor is not None:
        ray.kill(supervisor, no_restart=True)
    deadline = time.monotonic() + END_S
    while name in services() or find_replicas(name):
        for replica in find_replicas(name).values():
            ray.kill(replica, no_restart=True)
        if time.monotonic() > deadline:
            raise StartError(f"{name}: its actors did not end within {END_S:g} s")
        time.sleep(0.1)
    release_groups(name)
    LatentsStore(name, 0, 0).clear()


def _told(answer: Any, timeout_s: float) -> None:
    """Wait for an answer, and raise it if it is an error."""
    try:
        error = ray.get(answer, timeout=timeout_s or None)
    except ray.exceptions.RayError as raised:
        raise StartError(f"the supervisor died or does not answer: {str(raised).strip().splitlines()[0]}") from raised
    if isinstance(error, DisaggError):
        raise error
