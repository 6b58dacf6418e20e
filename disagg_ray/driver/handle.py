"""What submitting a request returns, to a pipeline of one's own or to a service."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

from disagg_ray.driver.loop import LoopThread
from disagg_ray.driver.signals import Answer
from disagg_ray.errors import Cancelled, DisaggError
from disagg_ray.progress.events import Event
from disagg_ray.request import Request, ResolvedRequest
from disagg_ray.result import Result


class Handle:
    """A submitted request: wait for it with `result`, `await` it, or `cancel` it."""

    def __init__(self, request: ResolvedRequest, loop: LoopThread | None = None) -> None:
        """Create the handle of a request that `loop` computes."""
        self.request = request
        self.progress: Event | None = None
        """The latest event."""
        self.future: Answer[Result] = Answer()
        """Of the result, for what takes futures; its owner completes it, anyone may cancel it."""
        self._loop = loop

    def result(self, timeout_s: float | None = None) -> Result:
        """Wait for the video.

        Raises:
            TimeoutError: not finished within `timeout_s`; the request continues.
            Cancelled: it was cancelled, or the pipeline closed.
            DisaggError: what failed it.
            RuntimeError: called on the pipeline's own thread, as by another request's done callback.
        """
        if self._loop is not None and not self.future.wait(0):
            self._loop.check_thread()
        try:
            return self.future.result(timeout_s)
        except concurrent.futures.CancelledError:
            raise self._cancelled() from None

    def __await__(self) -> Generator[Any, None, Result]:
        """Wait as `result` does; a task that is cancelled while it waits cancels the request."""
        return self._wait().__await__()

    async def _wait(self) -> Result:
        try:
            return await asyncio.wrap_future(self.future)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise self._cancelled() from None

    def _cancelled(self) -> Cancelled:
        return Cancelled(f"request {self.request.id} was cancelled")

    def done(self) -> bool:
        return self.future.done()

    def add_done_callback(self, call: Callable[[Handle], None]) -> None:
        """Call `call` with this handle when the request is finished, failed or cancelled, in some thread.

        That may be the pipeline's own: `call` must return soon, and what would wait for the pipeline, as `submit`
        does, raises RuntimeError there.
        """
        self.future.add_done_callback(lambda _: call(self))

    def cancel(self) -> bool:
        """Cancel the request: it leaves the queue, or stops within one denoising step. False: it is finished."""
        return self.future.cancel()


def gather(submit: Callable[[Request], Handle], requests: Iterable[Request], window: int) -> Iterator[Result]:
    """Yield each result as it finishes, with at most `window` requests submitted at once.

    A request that fails does not stop the others: the first failure is raised once all others are done.
    """
    pending: dict[concurrent.futures.Future[Result], Handle] = {}
    done: SimpleQueue[concurrent.futures.Future[Result]] = SimpleQueue()
    failures: list[DisaggError] = []
    left = iter(requests)
    try:
        while True:
            while len(pending) < window and (request := next(left, None)) is not None:
                try:
                    handle = submit(request)
                except DisaggError as error:
                    failures.append(error)
                else:
                    pending[handle.future] = handle
                    handle.future.add_done_callback(done.put)
            if not pending:
                break
            try:
                result = pending.pop(done.get()).result()
            except DisaggError as error:
                failures.append(error)
            else:
                yield result
    finally:
        for handle in pending.values():
            handle.cancel()
    if failures:
        for other in failures[1:]:
            failures[0].add_note(f"another request failed too: {other}")
        raise failures[0]
