"""Waits that signals end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from disagg_ray.driver.signals import Answer, Interrupts, exiting_on_sigterm, handler_kept, interruptible
from disagg_ray.errors import StageError

ENDS = [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
DEADLINE_S = 30.0


def handlers() -> list[object]:
    return [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]


def soon(call: Callable[..., object], *arguments: object) -> None:
    threading.Timer(0.2, call, arguments).start()


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("scope", [suppress, Interrupts])
def test_a_wait_ends_with_what_it_waits_for(scope: Callable[[], suppress]) -> None:
    answer, failed, late = Answer[int](), Answer[int](), Answer[int]()
    soon(answer.set_result, 3)
    soon(failed.set_exception, StageError("no"))
    with scope():
        assert answer.result(DEADLINE_S) == 3
        with pytest.raises(StageError, match="no"):
            failed.result(DEADLINE_S)
        assert not late.wait(0.01)
        with pytest.raises(TimeoutError):
            late.result(0.01)
        late.cancel()
        assert late.wait()


def test_several_threads_wait_for_one_answer() -> None:
    answer = Answer[int]()
    waiting = [threading.Thread(target=answer.wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    answer.set_result(3)
    for thread in waiting:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


@pytest.mark.parametrize(("signum", "raised"), ENDS)
def test_a_signal_ends_a_wait_and_the_next_wait_goes_on(signum: int, raised: type[BaseException]) -> None:
    before = handlers()
    with Interrupts():
        soon(send, signum)
        with pytest.raises(raised) as caught:
            Answer[None]().result(DEADLINE_S)
        answer = Answer[int]()
        soon(answer.set_result, 3)
        assert answer.result(DEADLINE_S) == 3
    assert handlers() == before
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 128 + signum


def test_a_signal_that_another_thread_gets_ends_a_wait() -> None:
    with Interrupts():
        soon(lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            Answer[None]().result(DEADLINE_S)


@pytest.mark.parametrize(("signum", "raised"), ENDS)
def test_a_signal_while_something_is_freed_ends_the_next_wait(signum: int, raised: type[BaseException]) -> None:
    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(signum)
            freed.append(self)

    freed: list[Freed] = []
    with Interrupts():
        something = Freed()
        del something
        assert freed
        with pytest.raises(raised):
            Answer[None]().result(DEADLINE_S)


@pytest.mark.parametrize(("signum", "raised"), ENDS)
def test_a_signal_that_ends_no_wait_is_raised_at_the_end(signum: int, raised: type[BaseException]) -> None:
    passed = []
    with pytest.raises(raised), Interrupts():
        signal.raise_signal(signum)
        passed.append(signum)
    assert passed


def test_a_second_signal_raises_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("signum", "raised"), ENDS)
def test_interruptible_work_is_interrupted(signum: int, raised: type[BaseException]) -> None:
    with Interrupts():
        with pytest.raises(raised), interruptible():
            signal.raise_signal(signum)
        signal.raise_signal(signum)
        with pytest.raises(raised), interruptible():
            pytest.fail("a signal that came before")


def test_another_thread_waits_undisturbed() -> None:
    answer, results = Answer[int](), []
    thread = threading.Thread(target=lambda: results.append(answer.result()))
    with pytest.raises(SystemExit), Interrupts():
        thread.start()
        signal.raise_signal(signal.SIGTERM)
        answer.set_result(3)
        thread.join(DEADLINE_S)
    assert results == [3]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As Ctrl-C is by what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_unwinds_a_program_with_its_status() -> None:
    before = handlers()
    with pytest.raises(SystemExit) as caught, exiting_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert handlers() == before


def test_a_handler_that_is_taken_meanwhile_is_given_back() -> None:
    with exiting_on_sigterm():
        before = handlers()
        with handler_kept():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        assert handlers() == before
        with pytest.raises(SystemExit) as caught, handler_kept():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
            signal.raise_signal(signal.SIGTERM)
        assert (handlers(), caught.value.code) == (before, 143)


@pytest.mark.slow
def test_ray_does_not_take_the_handler_of_a_command() -> None:
    program = """
import signal
from disagg_ray.config.load import load_config
from disagg_ray.driver.cluster import Cluster
from disagg_ray.driver.signals import Interrupts

with Interrupts():
    before = signal.getsignal(signal.SIGTERM)
    Cluster(load_config("conf/tiny_t2v.yaml")).close()
    assert signal.getsignal(signal.SIGTERM) == before
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=environment)
