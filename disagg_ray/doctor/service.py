"""Checks a service: its replicas answer, and a small video gets through."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

from disagg_ray.config.schema import Config
from disagg_ray.doctor.check import Check, at, fail, fail_unless, ok, warn, warn_unless
from disagg_ray.driver.calls import Actor, ask
from disagg_ray.driver.cluster import join
from disagg_ray.driver.names import find_replicas
from disagg_ray.errors import DisaggError, StartError
from disagg_ray.inputs import blank_inputs
from disagg_ray.request import Request
from disagg_ray.service.client import Connection
from disagg_ray.service.protocol import Snapshot, StageState
from disagg_ray.service.stub import take_snapshot
from disagg_ray.text import human_size

logger = logging.getLogger("disagg_ray")

ANSWER_S = 1.0
"""A sound replica answers a health check within this, computing or not."""
NUM_ASKS = 5
SILENT_S = 10.0
VIDEO_S = 300.0
"""Deadline of the video, which may wait for other requests."""


def examine_service(name: str, address: str | None) -> list[Check]:
    """Make every check of a service.

    Raises:
        InputError: the cluster has no such service; names those it has.
    """
    join(address)
    logger.info("doctor: asking service %s", name)
    try:
        snapshot = take_snapshot(name)
    except StartError as error:
        remedy = f"disagg-ray ls; if this persists: disagg-ray down {name}, then up again"
        return [fail("supervisor", str(error), remedy)]
    checks = [_check_state(snapshot), *map(_check_stage, snapshot.stages)]
    hosts = {replica.name: replica.host for replica in snapshot.replicas}
    actors = sorted((actor for actor in find_replicas(name) if actor.name in hosts), key=lambda actor: actor.name)
    for actor, seconds in zip(actors, asyncio.run(_time_all(actors)), strict=True):
        checks += at(hosts[actor.name], [check_answers(actor.name, seconds)])
    return checks + (list(_check_video(name)) if snapshot.state == "ready" else [])


def _check_state(snapshot: Snapshot) -> Check:
    age_min = snapshot.age_s / 60
    if snapshot.state == "ready":
        clients = f"clients: {len(snapshot.clients)}, their unfinished requests: {sum(snapshot.clients.values())}"
        return ok("supervisor", f"{snapshot.config.model.path}, up for {age_min:.0f} min; {clients}")
    if snapshot.state == "starting":
        return warn("supervisor", f"starting for {age_min:.0f} min", "see what it waits for: ray status, `ray logs`")
    return fail("supervisor", snapshot.state, f"disagg-ray down {snapshot.name}, then up again")


def _check_stage(state: StageState) -> Check:
    detail = f"{state.ready} of {state.wanted} replicas ready, {state.busy} busy; requests that wait: {state.waiting}"
    unless = warn_unless if state.ready else fail_unless
    remedy = "see what the others wait for: ray status, and `ray list actors`"
    return unless(state.ready >= state.wanted, state.stage, detail, remedy)


async def _time_all(actors: list[Actor]) -> list[float | None]:
    return list(await asyncio.gather(*map(_time, actors)))


async def _time(actor: Actor) -> float | None:
    """Return the longest seconds of several health checks; None: one failed or had no answer."""
    longest = 0.0
    for _ in range(NUM_ASKS):
        began = time.monotonic()
        try:
            async with asyncio.timeout(SILENT_S):
                await ask(actor, "health")
        except (TimeoutError, DisaggError):
            return None
        longest = max(longest, time.monotonic() - began)
    return longest


def check_answers(name: str, seconds: float | None) -> Check:
    """Judge the longest seconds of a replica's health checks; None: it did not answer."""
    if seconds is None:
        return fail(name, f"no answer within {SILENT_S:g} s", "it is replaced after failures.answer_s; see `ray logs`")
    detail = f"answers within {seconds * 1000:.0f} ms"
    return warn_unless(seconds <= ANSWER_S, name, detail, "see what else uses the CPUs of its node: top")


def _check_video(name: str) -> Iterator[Check]:
    logger.info("doctor: making one request of one step with %s", name)
    with Connection(name) as connection:
        handle = connection.submit(make_request(connection.config))
        request, makes = handle.request, connection.config.model.traits.makes
        about = f"{human_size(request.width, request.height, request.num_frames)}, {request.num_inference_steps} steps"
        try:
            result = handle.result(VIDEO_S)
        except TimeoutError:
            waiting = connection.snapshot().queued
            remedy = f"wait, or disagg-ray scale {name} STAGE=NUMBER; disagg-ray ls shows where requests wait"
            yield warn(makes, f"{about}: not within {VIDEO_S:g} s; requests that wait: {waiting}", remedy)
        except DisaggError as error:
            yield fail(makes, str(error), "see `ray logs` of the replica that it names")
        else:
            yield ok(makes, f"{about} in {result.seconds:.1f} s")


def make_request(config: Config) -> Request:
    """Return the request with the least work at the default size."""
    steps = None if config.model.sigmas else config.model.traits.least_steps
    return Request(prompt="a test", **blank_inputs(config), num_inference_steps=steps, seed=0)
