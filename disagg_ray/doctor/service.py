"""The checks of a service: its replicas are there and answer, and a video comes through."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import replace

from disagg_ray.config.schema import Config
from disagg_ray.doctor.check import Check, fail, ok, warn
from disagg_ray.driver.calls import Actor, ask
from disagg_ray.driver.cluster import join
from disagg_ray.driver.placement import living
from disagg_ray.errors import DisaggError, StartError
from disagg_ray.media.video import blank
from disagg_ray.request import IMAGES_OF, Request
from disagg_ray.service.client import Connection, take_snapshot
from disagg_ray.service.protocol import Snapshot, StageState

logger = logging.getLogger("disagg_ray")

ANSWER_S = 1.0
"""A replica says how it is within this, computing or not."""
NUM_ASKS = 5
SILENT_S = 10.0
VIDEO_S = 300.0
"""Until the video must be there; others may be before it."""


def examine_service(name: str, address: str | None) -> list[Check]:
    """Make every check of a pipeline of a cluster.

    Raises:
        InputError: no such pipeline stands; names those that do.
    """
    join(address)
    logger.info("doctor: asking pipeline %s", name)
    try:
        snapshot = take_snapshot(name)
    except StartError as error:
        return [fail("supervisor", str(error), f"disagg-ray ls; if it stays so: disagg-ray down {name}, and up again")]
    checks = [_check_state(snapshot), *map(_check_stage, snapshot.stages)]
    hosts = {replica.name: replica.host for replica in snapshot.replicas}
    found = sorted((actor for actor in living(name) if actor.name in hosts), key=lambda actor: actor.name)
    for actor, seconds in zip(found, asyncio.run(_time_all(found)), strict=True):
        checks.append(replace(check_answers(actor.name, seconds), node=hosts[actor.name]))
    return checks + (list(_check_video(name)) if snapshot.state == "ready" else [])


def _check_state(snapshot: Snapshot) -> Check:
    age_min = (time.time() - snapshot.began) / 60
    if snapshot.state == "ready":
        unfinished = sum(snapshot.drivers.values())
        about = f"{snapshot.config.model.path}, for {age_min:.0f} min; drivers: {len(snapshot.drivers)}"
        return ok("supervisor", f"{about}, their requests: {unfinished}")
    if snapshot.state == "starting":
        return warn(
            "supervisor", f"starting for {age_min:.0f} min", "see what it waits for: ray status, and `ray logs`"
        )
    return fail("supervisor", snapshot.state, f"disagg-ray down {snapshot.name}, and up again")


def _check_stage(state: StageState) -> Check:
    detail = f"{state.ready} of {state.wanted} replicas ready, {state.busy} busy; requests that wait: {state.waiting}"
    if state.ready >= state.wanted:
        return ok(state.stage, detail)
    remedy = "see what the others wait for: ray status, and `ray list actors`"
    return (warn if state.ready else fail)(state.stage, detail, remedy)


async def _time_all(actors: list[Actor]) -> list[float | None]:
    return list(await asyncio.gather(*map(_time, actors)))


async def _time(actor: Actor) -> float | None:
    """Return the longest seconds that a replica took to say how it is; None: it did not."""
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
    """Judge the longest seconds that a replica took to say how it is; None: it did not."""
    if seconds is None:
        return fail(name, f"no answer within {SILENT_S:g} s", "it is replaced after failures.answer_s; see `ray logs`")
    detail = f"answers within {seconds * 1000:.0f} ms"
    if seconds > ANSWER_S:
        return warn(name, detail, "see what else uses the CPUs of its node: top")
    return ok(name, detail)


def _check_video(name: str) -> Iterator[Check]:
    logger.info("doctor: making a video of one step with %s", name)
    with Connection(name) as connection:
        request = make_request(connection.config)
        handle = connection.submit(request)
        about = f"{handle.request.width}x{handle.request.height}, {handle.request.num_frames} frames, "
        about += f"{handle.request.num_inference_steps} steps"
        try:
            result = handle.result(VIDEO_S)
        except TimeoutError:
            waiting = connection.snapshot().queued
            remedy = f"wait, or disagg-ray scale {name} STAGE=NUMBER; disagg-ray ls shows where requests wait"
            yield warn("video", f"{about}: not within {VIDEO_S:g} s; requests that wait: {waiting}", remedy)
        except DisaggError as error:
            yield fail("video", str(error), "see `ray logs` of the replica that is named")
        else:
            yield ok("video", f"{about} in {result.seconds:.1f} s")


def make_request(config: Config) -> Request:
    """Return the request of the least work at the size that requests have who name none."""
    grey = blank(config.defaults.width, config.defaults.height)
    image, last_image = (grey if name in IMAGES_OF[config.model.task] else None for name in ("image", "last_image"))
    steps = None if config.model.sigmas else 1
    return Request(prompt="a test", image=image, last_image=last_image, num_inference_steps=steps, seed=0)
