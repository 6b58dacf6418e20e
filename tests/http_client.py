"""A client of an HTTP service that runs in the test's own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from helpers import wait_until
from starlette.testclient import TestClient

from disagg_ray import load_config
from disagg_ray.http.app import build_app
from disagg_ray.http.jobs import Jobs
from disagg_ray.http.settings import Settings, make_settings


def client_of(settings: Settings) -> TestClient:
    """Return a client of this machine; the service runs while the client is entered."""
    return TestClient(build_app(settings), base_url="http://localhost:8000", client=("127.0.0.1", 1))


def jobs_of(client: TestClient) -> Jobs:
    """Return the jobs of a client's service."""
    jobs: Jobs = cast("Any", client.app).state.jobs
    return jobs


@contextmanager
def ready(client: TestClient, timeout_s: float) -> Iterator[TestClient]:
    """Enter a client, wait until its service's replicas are ready, and give it."""
    with client:
        wait_until(lambda: client.get("/ready").status_code == 200, "never ready", timeout_s)
        yield client


def serve(model: str, config: str, folder: Path, *overrides: str, grace_s: float = 30.0) -> TestClient:
    """Give a client of a model's HTTP service, which runs while the client is entered."""
    settings = make_settings((model,), load_config(config, f"service.folder={folder}", *overrides))
    return client_of(replace(settings, grace_s=grace_s))
