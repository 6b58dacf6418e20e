"""What every request passes before its route: where it may come from, how large its body may be, and counting."""

from __future__ import annotations

import ipaddress
import logging
import time
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from disagg_ray.http.metrics import Metrics
from disagg_ray.http.schema import ApiError
from disagg_ray.text import name_type, shown

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("disagg_ray")

FORM_BYTES = 256 * 1024
"""Of a body beside its images' bytes."""
SECURITY = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    b"media-src 'self' blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
REMEDY = "without keys no other is served; set service.api_keys, and see `disagg-ray keys add --help`"
DOCS = "/docs"
"""FastAPI's page takes its scripts from a CDN, which our policy would refuse."""


class Guard:
    """ASGI middleware; turns what no route expected into an answer without a traceback."""

    def __init__(self, app: ASGIApp, *, loopback_only: bool, max_bytes: int, metrics: Metrics) -> None:
        self._app, self._loopback_only, self._max_bytes, self._metrics = app, loopback_only, max_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._metrics.answering():
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.perf_counter(), 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if scope["path"] != DOCS:
                    message["headers"] = [*message.get("headers", ()), *SECURITY.items()]
                self._metrics.answered(route_of(scope), status, time.perf_counter() - began)
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_place(scope, headers)
            await self._app(scope, self._bounded(headers, receive), send_counted)
        except ClientDisconnect:
            logger.info("%s %s: the client hung up", scope["method"], scope["path"])
        except ApiError as error:
            await to_response(error)(scope, receive, send_counted)
        except Exception:
            logger.exception("%s %s", scope["method"], scope["path"])
            if not status:  # else the answer has begun, and ends here
                await to_response(ApiError(500, "the service failed; its log says why"))(scope, receive, send_counted)

    def _check_place(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuse other hosts where there are no keys, and pages of other sites in a browser of this one."""
        host = headers.get("host", "")
        if (origin := headers.get("origin")) is not None and origin.partition("://")[2] != host:
            raise ApiError(403, f"Origin: {origin[:100]!r} is another site; open the service's own page")
        if not self._loopback_only:
            return
        client = (scope.get("client") or ("127.0.0.1", 0))[0]
        place = host.rpartition(":")[0] if _has_port(host) else host
        for name, value in (("client", client), ("Host", place)):
            if not is_loopback(value):
                raise ApiError(403, f"{name}: {shown(value)} is not this machine; {REMEDY}")

    def _bounded(self, headers: dict[str, str], receive: Receive) -> Receive:
        """Refuse a body by its announced length before it is read, and one that turns out longer."""
        most = self._max_bytes + FORM_BYTES
        too_large = ApiError(413, f"body: over service.max_upload_bytes={self._max_bytes}; send less", code="too_large")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        taken = 0

        async def receive_bounded() -> Message:
            nonlocal taken
            try:
                message = await receive()
            except Exception as error:  # noqa: BLE001 - whatever carried the request has died, Serve's proxy for example
                logger.info("a request can be received no more: %s", name_type(error))
                return {"type": "http.disconnect"}
            taken += len(message.get("body", b""))
            if taken > most:
                raise too_large
            return message

        return receive_bounded


def route_of(scope: Scope) -> str:
    """Return a route's path with its parameters' names, of which there are few."""
    return getattr(scope.get("route"), "path", "other")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _has_port(host: str) -> bool:
    return host.rpartition(":")[2].isdecimal() and not (host.count(":") > 1 and not host.startswith("["))


def to_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.to_json(), error.status, error.headers)
