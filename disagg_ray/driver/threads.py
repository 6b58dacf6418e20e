"""Threads for calls that may hang. Unlike an executor's, none of them keeps the process from ending."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger("disagg_ray")

_Call = tuple[Future[Any], Callable[[], Any]]


class Workers:
    """At most `count` threads, which take calls in their order."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        answer: Future[T] = Future()
        self._calls.put((answer, work))
        with self._lock:
            if len(self._threads) < self._count:
                name = f"{self._name}-{len(self._threads)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        return answer

    async def run(self, work: Callable[[], T]) -> T:
        """Have a call made and await it; one that is begun goes on when whoever waits is cancelled."""
        return await asyncio.wrap_future(self.submit(work))

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            _make(*call)
            del call  # and with it what it returned

    def close(self, timeout_s: float) -> bool:
        """Cancel the calls that are not begun and wait for the others; False: some hang and are left behind."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                break
            if call is not None:
                call[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def begin(work: Callable[[], T], name: str) -> Future[T]:
    """Make a call on a thread of its own."""
    answer: Future[T] = Future()
    threading.Thread(target=_make, args=(answer, work), name=f"disagg_ray-{name}", daemon=True).start()
    return answer


async def off_loop(work: Callable[..., T], *args: Any) -> T:
    """Make a blocking call on a thread of its own, as `asyncio.to_thread` would on one that is waited for at exit."""
    return await asyncio.wrap_future(begin(partial(work, *args), getattr(work, "__name__", "call")))


def within(timeout_s: float, work: Callable[[], object], name: str) -> bool:
    """Make a call and wait for it so long at most; False: it hangs and is left behind, which is logged."""
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
    except BaseException as error:  # noqa: BLE001 - whoever waits raises it
        answer.set_exception(error)
    else:
        answer.set_result(made)
