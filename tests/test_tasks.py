"""Background tasks that fail are logged, counted and started again."""

from __future__ import annotations

import asyncio
import logging

import pytest

from disagg_ray.driver import tasks
from disagg_ray.driver.tasks import BackgroundTasks


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FIRST_PAUSE_S", 0.0)


@pytest.mark.parametrize("error", [RuntimeError("no GCS"), asyncio.CancelledError()])
def test_a_task_that_raises_is_logged_counted_and_started_again(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    counted: list[str] = []

    async def run() -> None:
        left, did = [error, error], asyncio.Event()

        async def work(what: str) -> None:
            if left:
                raise left.pop()
            assert what == "argument"
            did.set()

        background = BackgroundTasks(counted.append)
        await background.start("look", work, "argument")
        assert did.is_set()

    asyncio.run(run())
    assert counted == ["look", "look"]
    assert [(r.levelno, r.exc_info is not None) for r in caplog.records] == [(logging.ERROR, True)] * 2
    assert "background task look failed; it is started again" in caplog.text


def test_a_counter_that_fails_stops_no_task(caplog: pytest.LogCaptureFixture) -> None:
    def count(name: str) -> None:
        raise ValueError("no metrics")

    async def run() -> None:
        left = [1]

        async def work() -> None:
            if left:
                raise RuntimeError(left.pop())

        await BackgroundTasks(count).start("look", work)

    asyncio.run(run())
    assert "the restart of background task look was not counted" in caplog.text


def test_closing_cancels_tasks_quietly_even_those_that_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "FIRST_PAUSE_S", 300.0)

    async def run() -> None:
        failed, background = asyncio.Event(), BackgroundTasks(lambda name: failed.set())

        async def fail() -> None:
            raise RuntimeError("once")

        started = [background.start("fail", fail), background.start("wait", asyncio.Event().wait)]  # type: ignore[arg-type]
        await failed.wait()
        await background.close()
        assert all(task.cancelled() for task in started)

    asyncio.run(run())
    assert len(caplog.records) == 1
