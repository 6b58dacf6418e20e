"""Waits for other threads that Ctrl-C and SIGTERM end.

Python runs a signal's handler between two instructions of the main thread. A handler that raises there, as Python's own
for Ctrl-C does, may leave a lock taken that another thread needs. So waiting for an `Answer` takes no such lock, and
within `Interrupts` a signal raises in such waits only.
"""

from __future__ import annotations

import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

T = TypeVar("T")

SIGNALS = signal.SIGTERM, signal.SIGINT

_this_thread = threading.local()
"""`interrupts`: those entered on this thread."""


class Answer(Future[T]):
    """A future that any thread may wait for; make it before the thread that sets it knows it."""

    def __init__(self) -> None:
        super().__init__()
        self._is_set = False
        self._woken: SimpleQueue[None] = SimpleQueue()
        self.add_done_callback(self._wake)

    def _wake(self, _: object) -> None:
        self._is_set = True
        self._woken.put(None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return whether it is done, or cancelled, within `timeout_s`."""
        interrupts: Interrupts | None = getattr(_this_thread, "interrupts", None)
        if interrupts is not None:
            interrupts.wait(self, timeout_s)
            return self.done()
        if not self._is_set:
            with suppress(Empty):
                self._woken.get(timeout=timeout_s)
                self._woken.put(None)  # for the next thread that waits
        return self._is_set

    def result(self, timeout: float | None = None) -> T:
        """Return the result, or raise the exception, as `Future.result`."""
        self.wait(timeout)
        return super().result(0)

    def set_once(self, result: T) -> None:
        """Set the result, unless it is done already."""
        with suppress(InvalidStateError):
            self.set_result(result)


class Interrupts:
    """While entered, Ctrl-C and SIGTERM raise on the main thread where it waits for an `Answer`, and nowhere else.

    Each ends one wait, the current or the next, with KeyboardInterrupt or SystemExit; what ended none is raised at the
    end. A second one that comes before that raises at once. A signal that is ignored stays ignored.
    """

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._suspended = False

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        handled = [each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
        self._before = {each: signal.signal(each, self._receive) for each in handled}
        _this_thread.interrupts = self
        return self

    def __exit__(self, *_: object) -> None:
        del _this_thread.interrupts
        for each, handler in self._before.items():
            signal.signal(each, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._reader.close()
        self._writer.close()
        self._raise_pending()

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        if self._suspended or self._pending:
            self._pending.clear()
            leave(signum)
        self._pending.append(signum)

    def wait(self, answer: Future[Any], timeout_s: float | None) -> None:
        """Wait until a future is done; return after `timeout_s` at the latest.

        Raises:
            KeyboardInterrupt, SystemExit: a signal came, during the wait or before it.
        """
        answer.add_done_callback(self._wake)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not answer.done() and not self._pending:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                break
            select.select([self._reader], [], [], remaining)  # a signal that any thread gets writes there too
            with suppress(BlockingIOError):
                self._reader.recv(4096)
        self._raise_pending()

    def _wake(self, _: object) -> None:
        with suppress(OSError):  # full, so it wakes already; or closed
            self._writer.send(b"\0")

    def _raise_pending(self) -> None:
        if self._pending:
            leave(self._pending.pop())

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Have signals raise wherever the main thread is."""
        self._raise_pending()
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False


def interruptible() -> AbstractContextManager[None]:
    """Let signals raise anywhere, for work that may take long and shares no lock with another thread."""
    interrupts: Interrupts | None = getattr(_this_thread, "interrupts", None)
    return interrupts.suspended() if interrupts is not None else nullcontext()


def leave(signum: int, _frame: FrameType | None = None) -> NoReturn:
    """Raise what ends a program on a signal; a handler where nothing else runs."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)


@contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the program, as Ctrl-C does, so that every `with` closes what it holds."""
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def handler_kept() -> Iterator[None]:
    """Keep the program's handler of SIGTERM over `ray.init`, which replaces it on the main thread by one that exits."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        raise SystemExit(128 + signal.SIGTERM) from error
    finally:
        if before not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
