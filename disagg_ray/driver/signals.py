"""Leaving when told to by SIGTERM or Ctrl-C.

Python runs a signal's handler between two instructions of the main thread. A signal that comes just before that thread
begins to wait, or at another thread, does not wake it: a wait without a deadline would go on, and the handler never
run. So the waits here look around every LOOK_S. And a handler that raises between two instructions may leave a lock
taken for good, and with it whoever shares it: the main thread should share none with the event loop.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import NoReturn, TypeVar

T = TypeVar("T")

LOOK_S = 0.1


@contextmanager
def terminated() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C unwind the program, so that every `with` closes what it holds.

    What a handler raises while an object is being freed goes no further; the signal is then sent again.
    """
    before, hook = signal.signal(signal.SIGTERM, _leave), sys.unraisablehook
    sys.unraisablehook = partial(_send_again, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def _send_again(hook: Callable[[sys.UnraisableHookArgs], object], swallowed: sys.UnraisableHookArgs) -> None:
    signum = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(swallowed.exc_type)
    if signum is None:
        hook(swallowed)
        return
    again = threading.Timer(LOOK_S, os.kill, (os.getpid(), signum))
    again.daemon = True
    again.start()


def _leave(signum: int, _frame: object) -> NoReturn:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)


def take(queue: SimpleQueue[T]) -> T:
    """Wait for the next item; a handler that raises meanwhile leaves the queue as it was."""
    while True:
        try:
            return queue.get(timeout=LOOK_S)
        except Empty:
            continue


class Latch:
    """Set once, for good. No thread ever needs a lock for it that another could leave taken."""

    def __init__(self) -> None:
        self._is_set = False
        self._woken: SimpleQueue[None] = SimpleQueue()

    def set(self, _: object = None) -> None:
        """Let everybody go on; as a future's callback too."""
        self._is_set = True
        self._woken.put(None)

    def wait(self, timeout_s: float = math.inf) -> bool:
        """Return whether it was set in time."""
        deadline = time.monotonic() + timeout_s
        while not self._is_set:
            if time.monotonic() > deadline:
                return False
            with suppress(Empty):
                self._woken.get(timeout=LOOK_S)
        self._woken.put(None)  # for the next
        return True


def until(changed: threading.Condition, is_so: Callable[[], object]) -> None:
    """Wait, with the condition's lock, until something is so."""
    while not changed.wait_for(is_so, LOOK_S):
        pass


def wait_for(work: Callable[[], None]) -> None:
    """Do work on another thread and wait for it; SIGTERM and Ctrl-C end the wait, as they would end the program.

    Whatever locks the work takes, no handler raises while it holds them. On a thread that is not the main one, no
    signal ends the wait.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    told: list[int] = []
    done: Future[None] = Future()
    handled = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(each, lambda signum, _: told.append(signum)) for each in handled]
    try:
        threading.Thread(target=_do, args=(work, done), daemon=True).start()
        while not done.done() and not told:
            wait([done], LOOK_S)
    finally:
        for each, handler in zip(handled, before, strict=True):
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)
    if told:
        _leave(told[0], None)
    done.result()


def _do(work: Callable[[], None], done: Future[None]) -> None:
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - whoever waits raises it
        done.set_exception(error)
    else:
        done.set_result(None)
