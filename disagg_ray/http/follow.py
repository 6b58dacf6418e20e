"""The states of one job, as they change, until it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial

from fastapi.concurrency import run_in_threadpool

from disagg_ray.http.jobs import Jobs
from disagg_ray.http.keys import Key
from disagg_ray.http.store import Job

POLL_S = 0.5
"""How soon one sees what another process did."""
BACKLOG = 256
"""Events that wait for a slow reader; older ones are dropped."""


async def follow(jobs: Jobs, key: Key, job: Job) -> AsyncGenerator[Job, None]:
    """Yield a job at each of its events and at least every `POLL_S`; end when it has ended, or was deleted."""
    queue: asyncio.Queue[Job] = asyncio.Queue(BACKLOG)
    loop = asyncio.get_running_loop()

    def put(job: Job) -> None:
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(job)

    unsubscribe = jobs.subscribe(job, partial(_call_soon, loop, put))
    try:
        while True:
            yield job
            if job.is_finished:
                return
            try:
                async with asyncio.timeout(POLL_S):
                    job = await queue.get()
            except TimeoutError:
                row = await run_in_threadpool(jobs.store.get, job.id, key.name)
                if row is None:  # deleted
                    return
                job = row
    finally:
        unsubscribe()


def _call_soon(loop: asyncio.AbstractEventLoop, put: Callable[[Job], None], job: Job) -> None:
    loop.call_soon_threadsafe(put, job)
