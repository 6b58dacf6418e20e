"""Two replicas of an HTTP service in one process: each answers for what the other runs, and takes it over."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import pytest
from http_client import client_of, jobs_of
from postgres import Postgres
from starlette.testclient import TestClient

from disagg_ray import cli, load_config
from disagg_ray.http.pace import MOST
from disagg_ray.http.settings import make_settings
from disagg_ray.http.store import Job

pytestmark = pytest.mark.proof

MODEL, T2V = "pair", "conf/tiny_t2v.yaml"
SMALL: dict[str, Any] = {"prompt": "a red circle moves left", "num_frames": 5, "num_inference_steps": 4, "seed": 3}
LONG = SMALL | {"num_frames": 33, "num_inference_steps": 100, "size": "128x128"}

wait_until = partial(helpers.wait_until, timeout_s=240.0)


@pytest.fixture(scope="module", autouse=True)
def model(cluster: None) -> Iterator[None]:
    assert cli.main(["up", MODEL, "--config", T2V, "fused=true", "failures.shutdown_grace_s=0"]) == 0
    yield
    assert cli.main(["down", MODEL]) == 0


def replica(folder: Path, url: str) -> TestClient:
    """Give a client of one replica, which runs while the client is entered."""
    config = load_config(T2V, f"service.folder={folder}", f"service.database={url}", "failures.shutdown_grace_s=0")
    return client_of(make_settings((MODEL,), config))


@pytest.fixture
def pair(tmp_path: Path, url: str) -> Iterator[tuple[TestClient, TestClient]]:
    with replica(tmp_path, url) as one, replica(tmp_path, url) as other:
        yield one, other


def post(http: TestClient, body: dict[str, Any], key: str | None = None) -> str:
    answer = http.post("/v1/videos", json=body, headers={"Idempotency-Key": key} if key else None)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def wait_for(http: TestClient, video_id: str, *statuses: str) -> dict[str, Any]:
    """Wait until a replica says that a job has one of these statuses; return what it says."""
    found: dict[str, Any] = {}

    def look() -> bool:
        found.update(http.get(f"/v1/videos/{video_id}").json())
        return found["status"] in statuses

    wait_until(look, f"{video_id} is never {statuses}")
    return found


def test_a_job_of_one_replica_is_followed_read_and_deleted_through_the_other(pair: tuple[TestClient, ...]) -> None:
    one, other = pair
    video_id = post(one, LONG | {"num_inference_steps": 20})
    with other.stream("GET", f"/v1/videos/{video_id}/events") as stream:
        lines = [line for line in stream.iter_lines() if line.startswith(("event:", "data:"))]
    seen = [json.loads(line.removeprefix("data:")) for line in lines[1::2]]
    assert lines[-2] == "event: completed"
    assert any(stage["step"] > 0 for video in seen for stage in video["stages"])
    content = f"/v1/videos/{video_id}/content"
    assert one.get(content).content == other.get(content).content != b""
    assert other.delete(f"/v1/videos/{video_id}").status_code == 200
    assert one.get(content).status_code == 404


def test_a_job_of_one_replica_is_cancelled_through_the_other(pair: tuple[TestClient, ...]) -> None:
    one, other = pair
    video_id = post(one, LONG)
    wait_for(other, video_id, "in_progress")
    assert other.post(f"/v1/videos/{video_id}/cancel").json()["status"] in ("cancelling", "cancelled")
    assert wait_for(one, video_id, "cancelled")["progress"] < 100


def test_a_job_of_one_replica_that_is_deleted_through_the_other_stops(pair: tuple[TestClient, ...]) -> None:
    one, other = pair
    runner, seen = jobs_of(one).runners[MODEL], list[Job]()
    video_id = post(one, LONG)
    runner.subscribe(video_id, seen.append)
    wait_for(other, video_id, "in_progress")
    assert other.delete(f"/v1/videos/{video_id}").status_code == 200
    wait_until(lambda: runner.job_ids() == [], "it goes on")
    assert seen[-1].progress < MOST  # per cent of a job whose stages are done


def test_posts_of_one_idempotency_key_to_both_replicas_are_one_job(pair: tuple[TestClient, ...]) -> None:
    keys = [uuid.uuid4().hex for _ in range(5)]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda http: [post(http, SMALL, key) for key in keys], pair))
    assert made[0] == made[1]
    assert {wait_for(pair[1], video_id, "completed")["progress"] for video_id in made[0]} == {100}


def test_what_a_replica_leaves_is_run_by_the_other(tmp_path: Path, url: str) -> None:
    with replica(tmp_path, url) as other:
        with replica(tmp_path, url) as one:
            made = [post(one, LONG | {"num_inference_steps": 10, "seed": seed}) for seed in range(3)]
        for video_id in made:
            wait_for(other, video_id, "completed")


def test_jobs_go_on_when_the_database_was_away(postgres: Postgres, tmp_path: Path) -> None:
    with ExitStack() as stack:
        one, other = (stack.enter_context(replica(tmp_path, postgres.url)) for _ in range(2))
        made = [post(one, SMALL | {"num_inference_steps": 20, "seed": seed}) for seed in range(6)]
        postgres.stop()
        away = one.post("/v1/videos", json=SMALL)
        assert (away.status_code, away.json()["error"]["code"]) == (503, "database_failed")
        postgres.start()
        made += [post(http, SMALL | {"seed": seed}) for seed in range(3) for http in (one, other)]
        for video_id in made:
            wait_for(other, video_id, "completed")
