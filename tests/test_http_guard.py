"""What every request passes: a connection that breaks ends its request, and is no fault of the service."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from disagg_ray.http.guard import Guard
from disagg_ray.http.metrics import Metrics

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/videos", "headers": [(b"host", b"localhost")]}


async def read_whole(scope: Scope, receive: Receive, _: Send) -> None:
    await Request(scope, receive).body()


async def wait_for_end(_: Scope, receive: Receive, __: Send) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@pytest.mark.parametrize("app", [read_whole, wait_for_end])
@pytest.mark.parametrize("end", [{"type": "http.disconnect"}, ConnectionError("the proxy died")], ids=["gone", "died"])
def test_a_client_that_hangs_up_ends_its_request_without_a_traceback(
    app: Any, end: Message | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    messages: list[Any] = [{"type": "http.request", "body": b"{", "more_body": True}, end]
    sent = list[Message]()

    async def receive() -> Message:
        message = messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return dict(message)

    async def send(message: Message) -> None:
        sent.append(message)

    guard = Guard(app, loopback_only=False, max_bytes=100, metrics=Metrics())
    with caplog.at_level(logging.INFO, "disagg_ray"):
        asyncio.run(guard(SCOPE, receive, send))
    assert (sent, messages) == ([], [])
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.INFO]
