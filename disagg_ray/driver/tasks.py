"""Background tasks of an event loop; failures are logged, and the task is started again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger("disagg_ray")

CLOSE_S = 5.0
FAILED = "background task %s failed; it is started again"

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
"""Before a failed task is started again: doubled at each failure, until it ran for the longest pause."""


class BackgroundTasks:
    """Runs coroutine functions until they return.

    What one raises is logged with its traceback and counted by `on_restart`; it is started again after a pause.
    """

    def __init__(self, on_restart: Callable[[str], None] = lambda name: None) -> None:
        self._on_restart = on_restart
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> asyncio.Task[None]:
        """Run `work(*args)` on the running loop; it may be called several times. Cancelling the task ends it."""
        task = asyncio.get_running_loop().create_task(self._supervise(name, work, args), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _supervise(
        self, name: str, work: Callable[..., Coroutine[Any, Any, None]], args: tuple[Any, ...]
    ) -> None:
        loop, pause_s = asyncio.get_running_loop(), FIRST_PAUSE_S
        while True:
            began = loop.time()
            try:
                return await work(*args)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                logger.exception(FAILED, name)  # something that it awaited was cancelled
            except Exception:
                logger.exception(FAILED, name)
            try:
                self._on_restart(name)
            except Exception:
                logger.exception("the restart of background task %s was not counted", name)
            if loop.time() - began > MAX_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def close(self) -> None:
        """Cancel every task but the calling one, and wait a while for them to end."""
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
