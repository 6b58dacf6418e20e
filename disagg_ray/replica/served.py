"""A replica as Ray launches it: its expected errors are answers, and what it is asked again it does once."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Hashable
from functools import partial, wraps
from typing import Any, TypeVar, cast

from disagg_ray.config.schema import Config
from disagg_ray.errors import DisaggError, ReplicaLost, StartError
from disagg_ray.replica.actor import Replica
from disagg_ray.replica.messages import Description, Encoded, ReplicaInfo, ReplicaState, Reply, Task
from disagg_ray.replica.once import Once
from disagg_ray.scheduling.blame import poisons
from disagg_ray.text import printable
from disagg_ray.transfer.handoff import AttemptKey, Handoff

F = TypeVar("F", bound=Callable[..., Any])

LAST_WORDS_S = 2.0
"""How long a process in which CUDA fails may still answer its driver, which ends it sooner."""


def answers(once: Callable[..., Hashable] | None = None) -> Callable[[F], F]:
    """Have a method return the DisaggError that it raises: raised, Ray would show a failed task.

    `once` returns the key of a call from its arguments: one with the key of an earlier call gets that one's answer, as
    its reply may have been lost.
    """

    def decorate(method: F) -> F:
        @wraps(method)
        def answer(self: ServedReplica, *args: Any) -> Any:
            work = partial(self.answer, method, *args)
            return work() if once is None else self.once.answer(method.__name__, once(*args), work)

        return cast(F, answer)

    return decorate


class ServedReplica(Replica):
    """A replica whose methods return errors.

    What its constructor raised is the answer to every call: Ray would end the process, with its native stack. After an
    error that poisons its process (`blame`), or that ends its gang, it answers so, does nothing more, and ends.
    """

    def __init__(self, stage: str, index: int, config: Config) -> None:
        self.once = Once()
        self._end: DisaggError | None = None
        """Why it serves nothing."""
        try:
            super().__init__(stage, index, config)
        except DisaggError as error:
            self._end = error
        except Exception as error:  # noqa: BLE001 - the process's boundary: the driver reports it
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{at.filename}:{at.lineno}"
            self._end = StartError(f"{self.name}: {type(error).__name__}: {printable(str(error))} ({where})")

    @answers()
    def describe(self) -> Description:
        return super().describe()

    @answers(once=lambda *_: None)
    def load(self, *args: Any) -> ReplicaInfo:
        return super().load(*args)

    @answers()
    def state(self) -> ReplicaState:
        return super().state()

    @answers(once=lambda task: task.key)
    def prefetch(self, task: Task) -> None:
        super().prefetch(task)

    @answers(once=lambda task: task.key)
    def run(self, task: Task) -> Reply:
        return super().run(task)

    @answers(once=lambda key, *_: key)
    def encode(self, key: AttemptKey, fps: int, format: str) -> Encoded:
        return super().encode(key, fps, format)

    @answers()
    def piece(self, key: AttemptKey, start: int) -> Handoff:
        return super().piece(key, start)

    def release(self, key: AttemptKey) -> None:
        super().release(key)
        self.once.forget(key)

    def answer(self, method: Callable[..., Any], *args: Any) -> Any:
        """Return what a method of this replica returns, or the DisaggError that it raises or would raise now."""
        if self._end is not None:
            return self._end
        try:
            return method(self, *args)
        except (DisaggError, RuntimeError) as error:
            if isinstance(error, ReplicaLost) or poisons(error):
                self._end = _lost(self.name, error)
                exiting = threading.Timer(LAST_WORDS_S, os._exit, (1,))
                exiting.daemon = True
                exiting.start()
                return self._end
            if isinstance(error, DisaggError):
                error.__cause__ = error.__context__ = None  # Ray drops them; here they would keep tensors alive
                return error.with_traceback(None)
            raise


def _lost(name: str, error: BaseException) -> ReplicaLost:
    if isinstance(error, ReplicaLost):  # of a rank, whose gang ends
        return ReplicaLost(str(error))
    first_line = (str(error).splitlines() or [""])[0]
    return ReplicaLost(f"{name}: {type(error).__name__}: {first_line}")
