"""An HTTP service whose disk is full, or whose clock is set: it answers, says so, and loses no job."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import http_client
import pytest
from http_client import ready
from starlette.testclient import TestClient

from disagg_ray import cli
from disagg_ray.http.files import file_of
from disagg_ray.http.store import Job, Store

pytestmark = pytest.mark.slow

T2V = "conf/tiny_t2v.yaml"
MODEL = "disk"
SMALL = {"prompt": "a red circle moves left", "num_frames": 5, "num_inference_steps": 2, "seed": 3}

wait_until = partial(helpers.wait_until, timeout_s=240.0)
serve = partial(http_client.serve, MODEL, T2V)


@pytest.fixture(scope="module")
def model(cluster: None) -> Iterator[str]:
    assert cli.main(["up", MODEL, "--config", T2V, "fused=true"]) == 0
    yield MODEL
    assert cli.main(["down", MODEL]) == 0


@pytest.fixture
def disk(small_disk: Path) -> Path:
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    return small_disk


def fill(disk: Path) -> Path:
    """Leave no room on a disk; return the file to remove."""
    (disk / "full").write_bytes(bytes(shutil.disk_usage(disk).free))
    return disk / "full"


def post(http: TestClient, **more: Any) -> str:
    answer = http.post("/v1/videos", json=SMALL | more)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def wait_for(http: TestClient, video_id: str) -> str:
    """Wait until a job has ended; return how."""
    place = f"/v1/videos/{video_id}"
    wait_until(lambda: http.get(place).json()["status"] in ("completed", "failed"), f"{video_id} never ended")
    return str(http.get(place).json()["status"])


@pytest.fixture
def job() -> Job:
    return Job("video_old", "", MODEL, 0, "x", {"format": "mp4", "priority": 0}, {}, "64x64", "1", time.time())


def test_a_full_disk_refuses_by_name_and_what_is_deleted_makes_room(model: str, disk: Path) -> None:
    with ready(serve(disk), 240.0) as http:
        done = post(http)
        assert wait_for(http, done) == "completed"
        with (disk / f"{done}.mp4").open("ab") as file:
            file.write(bytes(65536))  # as large as others are
        fill(disk)
        answer = http.post("/v1/videos", json=SMALL)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_failed")
        assert http.get(f"/v1/videos/{done}/content").status_code == 200
        assert http.delete(f"/v1/videos/{done}").status_code == 200
        assert wait_for(http, post(http)) == "completed"


def test_a_job_that_cannot_be_failed_on_a_full_disk_stops_no_other(
    model: str, disk: Path, tmp_path: Path, job: Job
) -> None:
    database = f"sqlite:///{disk / 'jobs.db'}"
    with closing(Store(database)) as store:
        (disk / "jobs.db.worker0").touch()
        with store.accepting("") as accepting:
            accepting.add(replace(job, settings=job.settings | {"num_frames": -1}))
        full = fill(disk)
        with ready(serve(tmp_path, f"service.database={database}"), 240.0) as http:
            assert http.post("/v1/videos", json=SMALL).json()["error"]["code"] == "database_failed"
            time.sleep(2.0)  # it is tried meanwhile
            assert http.get(f"/v1/videos/{job.id}").json()["status"] == "queued"
            full.unlink()
            assert wait_for(http, job.id) == "failed"
            assert wait_for(http, post(http)) == "completed"


def test_files_that_expire_make_room_on_a_full_disk(model: str, disk: Path, job: Job) -> None:
    with ready(serve(disk), 240.0) as http:
        (disk / file_of(job)).write_bytes(bytes(65536))
        old = replace(job, status="completed", completed_at=1.0, num_bytes=65536, expires_at=time.time() + 20)
        with closing(Store(f"sqlite:///{disk / 'jobs.db'}")) as store, store.accepting("") as accepting:
            accepting.add(old)
        full = fill(disk)
        wait_until(lambda: not (disk / file_of(job)).exists(), "it stays")
        assert full.exists()
        assert wait_for(http, post(http)) == "completed"


def test_uploads_that_the_temporary_folder_does_not_take_are_refused_by_name(
    model: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ready(serve(tmp_path / "files"), 240.0) as http:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        fill(disk)
        answer = http.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("a.png", bytes(2**21))})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_failed")
        assert "No space left" in answer.json()["error"]["message"]


@pytest.mark.parametrize("by_s", [-86400.0, 86400.0])
def test_a_clock_that_is_set_ends_no_job_and_removes_no_file(
    by_s: float, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    with ready(serve(tmp_path, "service.expires_after_s=3600"), 240.0) as http:
        done = post(http)
        assert wait_for(http, done) == "completed"
        monkeypatch.setattr(time, "time", lambda: now() + by_s)
        later = post(http, num_frames=33, num_inference_steps=60, size="128x128", deadline_s=600)
        assert wait_for(http, later) == "completed"
        assert http.get(f"/v1/videos/{done}/content").status_code == 200
