"""Calls that hang block neither close() nor the end of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from disagg_ray.driver.threads import off_loop, within


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
    code = "import threading; from disagg_ray.driver.threads import begin; begin(threading.Event().wait, 'x')"
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)


def test_a_forked_process_is_told_that_it_has_no_loop() -> None:
    code = (
        "import os, signal; from disagg_ray.driver.loop import LoopThread\n"
        "loop = LoopThread('pipeline')\n"
        "async def answer(): return 1\n"
        "assert loop.call(answer) == 1\n"
        "if (child := os.fork()) == 0:\n"
        "    signal.alarm(60)\n"
        "    try: loop.call(answer)\n"
        "    except RuntimeError as error: os._exit(7 if 'make a pipeline in this process' in str(error) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "loop.close()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=300, check=True)
