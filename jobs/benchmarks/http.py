"""The HTTP service's own cost: accepted jobs a second, polls a second, memory, and its share of a video's seconds.

Under each line are the cores that each process took meanwhile.

python jobs/bench.py http [SECONDS]
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import aiohttp
import numpy as np
import psutil

from disagg_ray import Pipeline, Request

CONFIG = "conf/tiny_t2v.yaml"
PORT = 8765
NUM_POLLERS, NUM_POSTERS, NUM_VIDEOS = 200, 8, 30
TINY = {"num_frames": 1, "num_inference_steps": 1}
LEAST = 0.02
"""Cores of a process that is named."""
PROCESSES = ("ray::ServeReplica", "ray::ProxyActor")


def main(arguments: Sequence[str]) -> None:
    seconds = float(arguments[0]) if arguments else 15.0
    with Pipeline.from_config(CONFIG, "fused=true") as pipeline:
        alone = [pipeline.generate(request_of(seed)).seconds for seed in range(NUM_VIDEOS)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "disagg_ray.cli", "serve", "--config", CONFIG, "--port", str(PORT),
                   "fused=true", f"service.folder={folder}", "limits.max_queued=100000"]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            next(line for line in child.stdout if line.startswith("page: "))
            root = psutil.Process(child.pid)
            asyncio.run(measure(seconds, float(np.median(alone)), root))
            for process in root.children(recursive=True):
                if process.name().startswith(PROCESSES):
                    print(f"{process.name()}: {process.memory_info().rss / 1e6:.0f} MB")
            child.terminate()


def request_of(seed: int) -> Request:
    return Request("a red circle moves left", seed=seed, **TINY)


async def measure(seconds: float, alone_s: float, root: psutil.Process) -> None:
    print(f"{os.cpu_count()} cores, clients included")
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{PORT}", connector=connector) as session:
        while (await session.get("/ready")).status != 200:
            await asyncio.sleep(0.2)
        with cores(root):
            made = [await finished(session, seed) for seed in range(NUM_VIDEOS)]
            share = float(np.median(made)) - alone_s
            print(f"a video: {1000 * alone_s:.0f} ms by itself, {1000 * share:.0f} ms more over HTTP, by its events")
        video_id = (await post(session, 0))["id"]

        async def get(_: int) -> None:
            async with session.get(f"/v1/videos/{video_id}") as answer:
                await answer.read()

        async def add(number: int) -> None:
            await post(session, number)

        with cores(root):
            await load("GET, 1 client", get, 1, seconds / 3)
        with cores(root):
            await load(f"GET, {NUM_POLLERS} clients", get, NUM_POLLERS, seconds)
        with cores(root):
            await load(f"POST, {NUM_POSTERS} clients", add, NUM_POSTERS, seconds)
        with cores(root):
            await asyncio.gather(
                load(f"POST, {NUM_POSTERS} clients beside the polls", add, NUM_POSTERS, seconds),
                load(f"GET, {NUM_POLLERS} clients that poll twice a second", get, NUM_POLLERS, seconds, every_s=0.5),
            )


@contextmanager
def cores(root: psutil.Process) -> Iterator[None]:
    """Print the cores that each process below a root, and this one, take meanwhile."""
    processes = [psutil.Process(), *root.children(recursive=True)]
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
