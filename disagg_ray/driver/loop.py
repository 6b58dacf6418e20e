"""An event loop in a thread of its own, which other threads call."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from disagg_ray.driver.signals import Answer
from disagg_ray.errors import Cancelled

T = TypeVar("T")

logger = logging.getLogger("disagg_ray")

CLOSE_S = 5.0
"""How long closing waits for the event loop, twice: until what runs there is cancelled, and until the loop ends."""

OWN_THREAD = (
    "this would wait for the pipeline's own thread, on which it is called, and never return: a done callback may run "
    "there; call submit, result, health, drain and close from another thread"
)
FORKED = (
    "this process was forked from the one whose pipeline this is, and would wait for ever; make a pipeline in this "
    "process, or start it by spawn"
)


class LoopThread:
    """Runs coroutines for other threads until it is closed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_closed = False
        self._is_closing = False
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._answers: set[Future[Any]] = set()
        """Of the tasks, and of those that the loop has not started yet."""
        self._process = os.getpid()
        self.thread = threading.Thread(target=self._run, name=f"disagg_ray-{name}", daemon=True)
        self.thread.start()

    def check_thread(self) -> None:
        """Refuse to wait for the loop on its own thread, where a done callback may run, or without its thread.

        Raises:
            RuntimeError: this is that thread, or a forked process, which has none of the other threads.
        """
        if threading.current_thread() is self.thread:
            raise RuntimeError(OWN_THREAD)
        if os.getpid() != self._process:
            raise RuntimeError(FORKED)

    def call(self, work: Callable[..., Coroutine[Any, Any, T]], *args: Any, timeout_s: float | None = None) -> T:
        """Run `work(*args)` on the loop and wait for it here.

        Raises:
            TimeoutError: it was not done in time; it is cancelled.
            Cancelled: the loop was closed.
            RuntimeError: called on the loop's own thread, or in a process that was forked.
        """
        self.check_thread()
        answer: Answer[T] = Answer()
        self.start(answer, work, *args)
        try:
            if not answer.wait(timeout_s):
                raise TimeoutError(f"{self.name}: no answer of its event loop within {timeout_s:g} s")
            return answer.result()
        except CancelledError:
            raise Cancelled(f"{self.name} was closed meanwhile") from None
        except BaseException:
            answer.cancel()
            raise

    def call_in_time(self, timeout_s: float, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Run what closing needs on the loop; return False if it hangs: it is left behind, which is logged."""
        try:
            self.call(work, timeout_s=timeout_s)
        except TimeoutError:
            logger.warning("%s: its event loop has hung for %g s: left behind", self.name, timeout_s)
            return False
        return True

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Have the loop call a function, from any thread; once the loop has ended, do nothing."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def start(self, answer: Future[T], work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> None:
        """Run `work(*args)` on the loop; its outcome goes to `answer`, and cancelling `answer` cancels it.

        As `asyncio.run_coroutine_threadsafe`, but for a future that is made, and watched, before the loop knows it:
        from then on the caller need not take its lock (`signals` says why).

        Raises:
            Cancelled: the loop has ended; one that ends before the work starts cancels `answer`.
        """

        def begin() -> None:
            if self._is_closing or answer.done():
                return
            task = self._loop.create_task(work(*args))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(partial(_copy_outcome, answer))
            answer.add_done_callback(lambda _: self.call_soon(task.cancel))

        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        try:
            if self.is_closed:  # or it hangs
                raise RuntimeError
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError:
            self._answers.discard(answer)
            raise Cancelled(f"{self.name} is closed") from None

    def _run(self) -> None:
        self._loop.run_forever()
        if left := asyncio.all_tasks(self._loop):  # `close` left the thread behind, and it resumed after all
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(left, timeout=CLOSE_S))
        self._loop.close()

    def close(self) -> None:
        """End the loop; calls that still wait for an answer get `Cancelled`. A loop that hangs is left behind."""

        async def cancel_others() -> None:
            self._is_closing = True
            others = self._tasks - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:
                await asyncio.wait(others, timeout=CLOSE_S)

        self.call_in_time(2 * CLOSE_S, cancel_others)
        self._is_closing = self.is_closed = True
        self.call_soon(self._loop.stop)
        self.thread.join(2 * CLOSE_S)
        for answer in list(self._answers):  # what did not start, or did not end
            answer.cancel()


def _copy_outcome(answer: Future[T], task: asyncio.Task[T]) -> None:
    """Give a future the outcome of a task."""
    if task.cancelled():
        answer.cancel()
    if not answer.set_running_or_notify_cancel():
        return
    if (error := task.exception()) is not None:
        answer.set_exception(error)
    else:
        answer.set_result(task.result())
