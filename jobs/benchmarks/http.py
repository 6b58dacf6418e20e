"""The HTTP service's own cost: accepted jobs a second, polls a second, memory, and its share of a video's seconds.

Beside it an application that answers a constant: what Ray Serve takes. Under each line are the cores that each process
took meanwhile.

python jobs/bench.py http [SECONDS]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
import numpy as np
import psutil
import ray
from ray import serve

from disagg_ray import Connection, Request, connect, load_config
from disagg_ray.http.app import MAX_ONGOING, serving
from disagg_ray.http.settings import make_settings
from disagg_ray.service import lifecycle

NAME, CONFIG = "bench", "conf/tiny_t2v.yaml"
HOST, PORT = "127.0.0.1", 8765
NUM_POLLERS, NUM_POSTERS, NUM_VIDEOS = 200, 8, 30
TINY = {"num_frames": 1, "num_inference_steps": 1}
LEAST = 0.02
"""Cores of a process that is named."""
PROCESSES = ("ray::ServeReplica", "ray::ProxyActor")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=float, default=15.0, help="of each line; default 15")
    seconds = parser.parse_args(arguments).seconds
    ray.init(address="local", num_cpus=16, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    lifecycle.up(NAME, load_config(CONFIG, "fused=true", "limits.max_queued=100000"))
    try:
        with tempfile.TemporaryDirectory() as folder, connect(NAME) as service:
            settings = make_settings((NAME,), load_config(CONFIG, f"service.folder={folder}"))
            with serving(settings, HOST, PORT):
                deploy_empty()
                asyncio.run(measure(seconds, service))
                for process in psutil.Process().children(recursive=True):
                    if process.name().startswith(PROCESSES):
                        print(f"{process.name()}: {process.memory_info().rss / 1e6:.0f} MB")
    finally:
        lifecycle.down(NAME, 0.0)
        ray.shutdown()


class Empty:
    """An application that answers a constant."""

    async def __call__(self, _: object) -> dict[str, str]:
        return {"status": "ok"}


def deploy_empty() -> None:
    """Have Ray Serve answer a constant at /empty."""
    deployment: Any = serve.deployment(
        Empty, name="empty", max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )  # fmt: skip
    serve.run(deployment.bind(), name="empty", route_prefix="/empty")


def request_of(seed: int) -> Request:
    return Request("a red circle moves left", seed=seed, **TINY)


async def measure(seconds: float, service: Connection) -> None:
    print(f"{os.cpu_count()} cores, clients included")
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://{HOST}:{PORT}", connector=connector) as session:
        while (await session.get("/ready")).status != 200:
            await asyncio.sleep(0.2)
        await compare_videos(session, service)
        video_id = (await post(session, 0))["id"]

        async def get(_: int) -> None:
            async with session.get(f"/v1/videos/{video_id}") as answer:
                await answer.read()

        async def get_empty(_: int) -> None:
            async with session.get("/empty/") as answer:
                await answer.read()

        async def add(number: int) -> None:
            await post(session, number)

        for number in (1, NUM_POLLERS, 1, NUM_POLLERS):
            for name, call in (("GET", get), ("GET of a constant", get_empty)):
                with cores():
                    await load(f"{name}, clients: {number}", call, number, seconds / 3)
        with cores():
            await load(f"POST, {NUM_POSTERS} clients", add, NUM_POSTERS, seconds)
        with cores():
            await asyncio.gather(
                load(f"POST, {NUM_POSTERS} clients beside the polls", add, NUM_POSTERS, seconds),
                load(f"GET, {NUM_POLLERS} clients that poll twice a second", get, NUM_POLLERS, seconds, every_s=0.5),
            )


async def compare_videos(session: aiohttp.ClientSession, service: Connection) -> None:
    """Print what a video takes from the service and over HTTP, one after the other again and again."""
    pairs = []
    for seed in range(2 * NUM_VIDEOS):
        began = time.perf_counter()
        await asyncio.to_thread(service.generate, request_of(seed))
        pairs.append((time.perf_counter() - began, await finished(session, seed)))
    alone, over_http = 1000 * np.array(pairs[NUM_VIDEOS:]).T
    print(
        f"a video: {np.median(alone):.0f} ms from the service, {np.median(over_http):.0f} ms over HTTP by its events; "
        f"median of the differences {np.median(over_http - alone):.0f} ms"
    )


@contextmanager
def cores() -> Iterator[None]:
    """Print the cores that this process and each below it take meanwhile."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    began, before = time.perf_counter(), {each: busy_s(each) for each in processes}
    yield
    seconds = time.perf_counter() - began
    taken = sorted(((busy_s(each) - before[each]) / seconds, each.name()) for each in processes if each.is_running())
    print("   cores: " + ", ".join(f"{name} {part:.2f}" for part, name in reversed(taken) if part >= LEAST), flush=True)


def busy_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def post(session: aiohttp.ClientSession, seed: int) -> dict[str, str]:
    async with session.post("/v1/videos", json={"prompt": "a red circle moves left", "seed": seed, **TINY}) as answer:
        assert answer.status == 200, await answer.text()
        return dict(await answer.json())


async def finished(session: aiohttp.ClientSession, seed: int) -> float:
    """Return the seconds from a POST until the stream of its events says completed."""
    began = time.perf_counter()
    video_id = (await post(session, seed))["id"]
    async with session.get(f"/v1/videos/{video_id}/events") as answer:
        async for line in answer.content:
            if line.strip() == b"event: completed":
                break
    return time.perf_counter() - began


async def load(
    what: str, call: Callable[[int], Awaitable[None]], number: int, seconds: float, every_s: float = 0.0
) -> None:
    """Have clients call again and again; print how many answers came a second, and how late."""
    ended, waits = time.perf_counter() + seconds, list[float]()

    async def client(index: int) -> None:
        await asyncio.sleep(every_s * index / number)
        while (began := time.perf_counter()) < ended:
            await call(index)
            waits.append(time.perf_counter() - began)
            await asyncio.sleep(max(0.0, every_s - waits[-1]))

    await asyncio.gather(*(client(index) for index in range(number)))
    p50, p99 = 1000 * np.percentile(waits, (50, 99))
    print(f"{what}: {len(waits) / seconds:.0f} a second, p50 {p50:.0f} ms, p99 {p99:.0f} ms", flush=True)
