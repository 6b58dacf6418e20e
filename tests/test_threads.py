"""Calls that hang keep neither whoever closes nor the process waiting."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from disagg_ray.driver.threads import Workers, off_loop, within


def test_answers_and_errors_come_back() -> None:
    workers = Workers(2, "test")
    assert [workers.submit(lambda n=n: n * n).result(60) for n in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 / 0).result(60)
    assert len(workers._threads) == 2
    assert workers.close(60)


def test_closing_cancels_what_waits_and_leaves_what_hangs() -> None:
    workers, began, go = Workers(1, "test"), threading.Event(), threading.Event()

    def hang() -> str:
        began.set()
        go.wait(60)
        return "late"

    hanging, waiting = workers.submit(hang), workers.submit(str)
    assert began.wait(60)
    assert not workers.close(0.1)
    with pytest.raises(CancelledError):
        waiting.result(0)
    go.set()
    assert hanging.result(60) == "late"


def test_a_call_that_hangs_is_left_behind_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    go = threading.Event()
    assert not within(0.1, go.wait, "waiting for Godot")
    assert "waiting for Godot has hung for 0.1 s: left behind" in caplog.text
    go.set()
    assert within(60, go.wait, "waiting")
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0, "dividing")


def test_the_loop_goes_on_while_a_call_blocks() -> None:
    async def run() -> str:
        go = threading.Event()
        asyncio.get_running_loop().call_soon(go.set)
        assert await off_loop(go.wait, 60)
        return await off_loop(str, "done")

    assert asyncio.run(run()) == "done"


def test_a_process_ends_while_calls_hang() -> None:
    code = (
        "import threading; from disagg_ray.driver.threads import Workers, begin; forever = threading.Event().wait;"
        "begin(forever, 'x'); Workers(1, 'w').submit(forever)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
