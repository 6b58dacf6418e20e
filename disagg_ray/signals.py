"""Leaving when told to by SIGTERM or Ctrl-C.

Python runs a signal's handler between two instructions of the main thread. A signal that comes just before that thread
begins to wait, or at another thread, does not wake it: a wait without a deadline would go on, and the handler never
run. So the waits here look around every LOOK_S.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

LOOK_S = 0.1


@contextmanager
def terminated() -> Iterator[None]:
    """Let SIGTERM unwind the program, so that every `with` closes what it holds."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(signum: int, _frame: object) -> NoReturn:
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)


def take(queue: SimpleQueue[T]) -> T:
    """Wait for the next item. Its lock is this queue's own: a handler that raises meanwhile leaves none taken."""
    while True:
        try:
            return queue.get(timeout=LOOK_S)
        except Empty:
            continue


def first_done(*futures: Future[Any]) -> Future[Any]:
    """Wait until one of these is done."""
    done: SimpleQueue[Future[Any]] = SimpleQueue()
    for future in futures:
        future.add_done_callback(done.put)
    return take(done)


def result_of(future: Future[T], timeout_s: float | None = None) -> T:
    """Wait for a future's result; a wait that ends by itself hears of a signal no later than then."""
    if timeout_s is None:
        first_done(future)
    return future.result(timeout_s)


def until(changed: threading.Condition, is_so: Callable[[], object]) -> None:
    """Wait, with the condition's lock, until something is so."""
    while not changed.wait_for(is_so, LOOK_S):
        pass


def wait_for(work: Callable[[], None]) -> None:
    """Do work on another thread and wait for it; SIGTERM and Ctrl-C end the wait, as they would end the program.

    A handler that raises may do so between any two instructions, and so may leave a lock taken for good. Here it
    raises where none is held. On a thread that is not the main one, no signal ends the wait.
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
