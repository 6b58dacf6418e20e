"""Calls that may be made again, as a reply may be lost on the way: each is worked at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

from disagg_ray.errors import StageError

T = TypeVar("T")

NUM_KEPT = 32
"""Answers that outlive `forget`, those of calls that failed."""


class Once:
    """Thread-safe. A call that is made again gets the answer of the first, and waits for it while that is worked at."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[str, Hashable], Future[Any]] = OrderedDict()

    def answer(self, method: str, key: Hashable, work: Callable[[], T]) -> T:
        """Return what `work` returned when this call was made first.

        Raises:
            StageError: the first raised; the error itself would keep the tensors of its frames alive.
        """
        with self._lock:
            answer = self._answers.get((method, key))
            if is_first := answer is None:
                answer = self._answers[method, key] = Future()
        if is_first:
            try:
                answer.set_result(work())
            except BaseException as error:
                answer.set_exception(StageError(f"{type(error).__name__}: {error}"))
                raise
            finally:
                self._drop_oldest()
        result: T = answer.result()
        return result

    def forget(self, key: Hashable) -> None:
        """Drop what was answered about a key."""
        with self._lock:
            for call in [call for call, answer in self._answers.items() if call[1] == key and answer.done()]:
                del self._answers[call]

    def _drop_oldest(self) -> None:
        with self._lock:
            done = [call for call, answer in self._answers.items() if answer.done()]
            for call in done[:-NUM_KEPT]:
                del self._answers[call]
