"""Waits that signals end."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from disagg_ray.errors import StageError
from disagg_ray.signals import LOOK_S, wait_for


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


def test_on_another_thread_it_just_works() -> None:
    done = threading.Event()
    thread = threading.Thread(target=wait_for, args=(done.set,))
    thread.start()
    thread.join(10)
    assert done.is_set()
