"""Daemon threads for calls that may hang: unlike an executor's threads, they never keep the process from ending."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger("disagg_ray")


def begin(work: Callable[[], T], name: str) -> Future[T]:
    """Make a call on a new thread."""
    answer: Future[T] = Future()
    threading.Thread(target=_make, args=(answer, work), name=f"disagg_ray-{name}", daemon=True).start()
    return answer


async def off_loop(work: Callable[..., T], *args: Any) -> T:
    """Make a blocking call on a new thread; `asyncio.to_thread` would have the process wait for it at exit."""
    return await asyncio.wrap_future(begin(partial(work, *args), getattr(work, "__name__", "call")))


def within(timeout_s: float, work: Callable[[], object], name: str) -> bool:
    """Make a call and wait at most `timeout_s` for it; return False if it hangs and is left behind, which is logged."""
    try:
        begin(work, name).result(timeout_s)
    except FutureTimeout:
        logger.warning("%s has hung for %g s: left behind", name, timeout_s)
        return False
    return True


def _make(answer: Future[T], work: Callable[[], T]) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        made = work()
    except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
        answer.set_exception(error)
    else:
        answer.set_result(made)
