"""The application: by `disagg-ray serve` on a laptop, or on a cluster by a Serve configuration that names `app`.

import_path: disagg_ray.http.app:app
args: {connect: video, folder: /data/videos, api_keys: /data/keys.json}
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from disagg_ray.config.builtin import find_file
from disagg_ray.config.load import load_config
from disagg_ray.errors import ConfigError, DisaggError, InputError, OutputError, StartError
from disagg_ray.http import images
from disagg_ray.http.guard import Guard, to_response
from disagg_ray.http.jobs import Jobs
from disagg_ray.http.routes import router
from disagg_ray.http.schema import ApiError
from disagg_ray.http.settings import Settings, make_settings, override
from disagg_ray.service import lifecycle
from disagg_ray.service.stub import take_snapshot
from disagg_ray.text import printable
from disagg_ray.version import VERSION

logger = logging.getLogger("disagg_ray")

NAME = "disagg_ray"
"""Of the Serve application that `disagg-ray serve` starts."""
MAX_ONGOING = 10_000
"""Requests at once in one replica: each open stream is one."""
QUIET: dict[str, Any] = {"log_level": "WARNING"}
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a disk says that is full, read-only or broken."""
SPARE_S = 30.0
"""What ending takes beyond `grace_s`."""


def build_app(settings: Settings) -> FastAPI:
    """Return the ASGI application of an HTTP service, whose jobs run from its start to its end.

    Raises:
        DisaggError: a service, the database, the folder or the keys cannot be used.
    """
    jobs = Jobs(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        jobs.close()

    app = FastAPI(title="disagg_ray", version=VERSION, lifespan=lifespan, redoc_url=None)
    app.state.jobs, app.state.max_bytes = jobs, settings.service.max_upload_bytes
    app.include_router(router)
    app.include_router(images.router)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(
        Guard, loopback_only=not jobs.keys.are_on, max_bytes=settings.service.max_upload_bytes,
        metrics=jobs.metrics,
    )  # fmt: skip
    return app


async def _answer(_: Request, error: Exception) -> JSONResponse:
    """Return an error in OpenAI's form."""
    return to_response(_explain(error))


def _explain(error: Exception) -> ApiError:
    answer = ApiError(503, printable(str(error), 500))
    match error:
        case ApiError():
            answer = error
        case RequestValidationError():
            first = error.errors()[0]
            param = printable(str(first["loc"][-1]))
            answer = ApiError(400, f"{param}: {first['msg']}", param=param)
        case HTTPException():
            answer = ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case OutputError():
            answer = ApiError(503, "service.folder: files cannot be reached", code="storage_failed")
        case SQLAlchemyError():
            message = "service.database: it failed or is away; try again; the service's log says why"
            answer = ApiError(503, message, code="database_failed")
        case OSError() if error.errno in DISK:  # as of the temporary folder, which takes uploads first
            message = f"the service's disk takes no file: {error.strerror}; try again later"
            answer = ApiError(503, message, code="storage_failed")
        case OSError():
            raise error
        case ConfigError():  # of the service's own, as of its keys
            answer = ApiError(503, "the service's configuration cannot be used; its log says why", code="misconfigured")
        case InputError():
            answer = ApiError(400, printable(str(error), 500))
    if answer.status >= 500:
        logger.warning("%s", error)
    return answer


HANDLERS = dict.fromkeys(
    (ApiError, RequestValidationError, HTTPException, SQLAlchemyError, DisaggError, OSError), _answer
)


def deploy(settings: Settings) -> serve.Application:
    """Return the Serve application of an HTTP service."""

    def build() -> FastAPI:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return build_app(settings)

    deployment: Any = serve.deployment(
        serve.ingress(build)(), name="videos", max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.grace_s + SPARE_S, logging_config=QUIET | {"enable_access_log": False},
    )  # fmt: skip
    bound: serve.Application = deployment.bind()
    return bound


@contextmanager
def serving(settings: Settings, host: str, port: int) -> Iterator[None]:
    """Have Ray Serve answer at an address of this machine; at the end its jobs get `grace_s`, and Serve is shut down.

    Raises:
        StartError: it did not start; says why.
    """
    _check_alone()
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=QUIET)
        serve.run(deploy(settings), name=NAME, route_prefix="/")
        yield
    except RuntimeError as error:
        raise StartError(f"HTTP service: {printable(str(error).strip(), 1000)}") from error
    finally:
        serve.shutdown()


def _check_alone() -> None:
    """Refuse a cluster where Ray Serve runs: it would keep its address, and be shut down with what others serve."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return
    raise StartError(
        "HTTP service: Ray Serve runs already on this cluster, with an address of its own; end it with "
        "`serve shutdown`; one `disagg-ray serve` serves several pipelines, with --connect NAME NAME"
    )


def app(args: Mapping[str, Any]) -> serve.Application:
    """Return the application of a Serve configuration's `args`.

    They are `connect` (names of services), or `config` (a file that is put up as `name`, with `overrides`), and the
    keys of `settings.KEYS`.

    Raises:
        DisaggError: an argument is unknown or impossible, or a service does not run.
    """
    given = dict(args)
    names, file, name = given.pop("connect", ()), given.pop("config", None), given.pop("name", None)
    models = (names,) if isinstance(names, str) else tuple(names)
    if bool(models) == (file is not None):
        raise InputError("args.connect: give names of services, or a file as args.config, and not both")
    if file is not None:
        models = (name or find_file(file).stem,)
        lifecycle.up(models[0], load_config(file, *given.pop("overrides", ())))
    return deploy(make_settings(models, override(take_snapshot(models[0]).config, given)))
