"""The supervisor without Ray: what becomes of its clients' requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_ray import Request, StartError, load_config
from disagg_ray.driver.handle import Handle
from disagg_ray.request import ResolvedRequest, resolve
from disagg_ray.service import supervisor
from disagg_ray.service.protocol import SubmitMessage
from disagg_ray.service.supervisor import Supervisor

SOON_S = 60.0


class Pipeline:
    """Takes requests and does nothing with them."""

    def __init__(self, config: Any, *_: object) -> None:
        self.engine, self.setup = SimpleNamespace(config=config), "setup"

    def enqueue(self, request: ResolvedRequest, *_: object) -> Handle:
        return Handle(request)


def begin(monkeypatch: pytest.MonkeyPatch, pipeline: Callable[..., Any] = Pipeline, *overrides: str) -> Supervisor:
    monkeypatch.setattr(supervisor, "ServicePipeline", pipeline)
    return Supervisor("wan", load_config("conf/tiny_t2v.yaml", *overrides))


async def submit(service: Supervisor, name: str, connection: str) -> SubmitMessage:
    request, _ = resolve(Request(prompt="a cat", seed=1, id=name), service._config)
    message = SubmitMessage(request, {}, keep=False, client=connection)
    assert await service.submit("run", message, wait=False) is None
    return message


def unfinished(service: Supervisor) -> set[str]:
    return {name for name, entry in service._clients["run"].entries.items() if not entry.handle.done()}


def test_a_connection_that_leaves_cancels_its_own_requests_and_no_others_of_its_run_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        service = begin(monkeypatch)
        await submit(service, "old", "first")
        await submit(service, "both", "first")
        await submit(service, "both", "second")
        await submit(service, "new", "second")
        await service.leave("run", "first")
        assert unfinished(service) == {"both", "new"}
        await service.leave("run", "first")
        await service.leave("run", "second")
        assert not service._clients

    asyncio.run(run())


def test_requests_of_a_dead_connection_end_although_another_of_its_run_id_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        service = begin(monkeypatch, Pipeline, "service.client_timeout_s=0.4")
        await submit(service, "old", "first")
        await submit(service, "new", "second")
        async with asyncio.timeout(SOON_S):
            while "old" in unfinished(service):
                await service.listen("run", "second", [])
        assert unfinished(service) == {"new"}

    asyncio.run(run())


def test_a_supervisor_that_was_stopped_for_a_while_does_not_take_its_clients_for_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        service = begin(monkeypatch, Pipeline, "service.client_timeout_s=0.4")
        await submit(service, "video", "first")
        await asyncio.sleep(0)
        time.sleep(0.8)  # as a process that was sent SIGSTOP and SIGCONT
        await asyncio.sleep(0.01)  # until what came meanwhile is read
        await service.listen("run", "first", [])
        assert unfinished(service) == {"video"}

    asyncio.run(run())


def test_a_service_that_did_not_start_says_so_and_starts_once_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RETRY_S", 0.01)
    lacking = [True]

    def start(*arguments: Any) -> Pipeline:
        if lacking:
            raise StartError("no GPU is left")
        return Pipeline(*arguments)

    async def run() -> None:
        service = begin(monkeypatch, start)
        assert str(await service.ready()) == "no GPU is left"
        lacking.clear()
        deadline = time.monotonic() + SOON_S
        while await service.ready() is not None:
            assert time.monotonic() < deadline
        await submit(service, "video", "first")

    asyncio.run(run())
