"""Waits that signals end."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest

from disagg_ray.driver.signals import LOOK_S, Latch, take, terminated, until, wait_for
from disagg_ray.errors import StageError


def handlers() -> list[object]:
    return [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]


def kill_soon(signum: int, after_s: float) -> None:
    threading.Timer(after_s, os.kill, (os.getpid(), signum)).start()


def test_it_waits_until_the_work_is_done() -> None:
    before, done = handlers(), threading.Event()

    def work() -> None:
        time.sleep(3 * LOOK_S)  # it looks several times
        done.set()

    wait_for(work)
    assert done.is_set()
    assert handlers() == before


def test_an_error_of_the_work_is_raised() -> None:
    def fail() -> None:
        raise StageError("no")

    with pytest.raises(StageError, match="no"):
        wait_for(fail)


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_wait(signum: int, raised: type[BaseException]) -> None:
    before, go = handlers(), threading.Event()
    kill_soon(signum, 0.1)
    with pytest.raises(raised) as caught:
        wait_for(lambda: go.wait(60))  # type: ignore[arg-type, return-value]
    go.set()
    assert handlers() == before
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 128 + signum


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_is_heard_though_it_comes_while_something_is_freed(signum: int, raised: type[BaseException]) -> None:
    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(signum)
            handled.append(False)  # unreachable: the handler has raised

    before, handled = sys.unraisablehook, [True]
    with terminated():
        something = Freed()
        del something
        assert handled == [True]
        with pytest.raises(raised):
            take(SimpleQueue())
    assert sys.unraisablehook == before


def test_other_errors_that_cannot_be_raised_are_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Freed:
        def __del__(self) -> None:
            raise StageError("no")

    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda swallowed: told.append(swallowed.exc_type))
    with terminated():
        something = Freed()
        del something
    assert told == [StageError]


def test_on_another_thread_it_just_works() -> None:
    done = threading.Event()
    thread = threading.Thread(target=wait_for, args=(done.set,))
    thread.start()
    thread.join(10)
    assert done.is_set()


class Told(Exception):
    """What a handler raises."""


@pytest.fixture
def told_elsewhere() -> Iterator[None]:
    """Have another thread get a signal soon whose handler raises; only the main thread ever runs it.

    No garbage is collected meanwhile: Hypothesis is called when it is, and would swallow what the handler raises.
    """
    heard, woken = threading.Event(), []

    def tell(*_: object) -> None:
        heard.set()
        raise Told

    def get_told() -> None:
        time.sleep(2 * LOOK_S)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        if not heard.wait(50 * LOOK_S):
            woken.append("by a signal of its own")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, tell)
    gc.disable()
    threading.Thread(target=get_told).start()
    yield
    gc.enable()
    signal.signal(signal.SIGUSR1, before)
    assert not woken


CHANGED = threading.Condition()


def wait_until_changed() -> None:
    with CHANGED:
        until(CHANGED, lambda: False)


@pytest.mark.parametrize(
    "wait", [lambda: take(SimpleQueue()), Latch().wait, wait_until_changed], ids=["take", "Latch", "until"]
)
@pytest.mark.usefixtures("told_elsewhere")
def test_a_signal_that_another_thread_gets_ends_a_wait(wait: Callable[[], object]) -> None:
    with pytest.raises(Told):
        wait()
    assert CHANGED.acquire(blocking=False)
    CHANGED.release()


def test_a_wait_ends_with_what_it_waits_for() -> None:
    items: SimpleQueue[int] = SimpleQueue()
    threading.Timer(2 * LOOK_S, items.put, (3,)).start()
    assert take(items) == 3
    with CHANGED:
        until(CHANGED, lambda: True)
    latch = Latch()
    threading.Timer(2 * LOOK_S, latch.set).start()
    waiting = [threading.Thread(target=latch.wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    latch.wait()
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()
