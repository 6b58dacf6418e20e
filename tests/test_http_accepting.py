"""Uploads of jobs that were never accepted: none stays, whatever ended the process that wrote them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from disagg_ray.config.deployment import ServiceConfig
from disagg_ray.http import uploads
from disagg_ray.http.files import Folder
from disagg_ray.http.metrics import Metrics
from disagg_ray.http.queues import Queues
from disagg_ray.http.schema import ApiError
from disagg_ray.http.store import Job, Store
from disagg_ray.http.upkeep import Upkeep
from disagg_ray.http.uploads import Uploads

KILLED = """
import os, signal, sys
from disagg_ray.http.files import Folder
from disagg_ray.http.store import Job, Store
from disagg_ray.http.uploads import Uploads

url, place, job_id = sys.argv[1:]
job = Job(job_id, "", "wan", 0, "", {}, {"image": f"{job_id}.image"}, "", "", 0.0)
folder = Folder(place)
with Uploads(Store(url), folder).noted(job):
    folder.write(job.images["image"], b"an image")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["", "local://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """Give a folder, by its path or a URL."""
    (tmp_path / "files").mkdir()
    return Folder(f"{request.param}{tmp_path}/files")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with closing(Store(url)) as opened:
        yield opened


@pytest.fixture
def job() -> Job:
    name = f"video_{time.time_ns()}"
    settings = {"format": "mp4", "priority": 0}
    return Job(name, "", "wan", 0, "", settings, {"mask": f"{name}.mask"}, "64x64", "1", time.time(), num_bytes=4)


def upkeep_of(store: Store, folder: Folder, noted: Uploads) -> Upkeep:
    """Return the upkeep of a service without models."""
    return Upkeep(ServiceConfig(), store, folder, noted, {}, Queues(store, {}), Metrics())


def accept(store: Store, noted: Uploads, job: Job) -> None:
    with store.accepting(job.tenant) as accepting:
        noted.take(accepting, job)
        accepting.add(job)


def test_what_a_killed_process_wrote_is_removed_after_a_while(
    store: Store, url: str, folder: Folder, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "files"
    child = subprocess.run([sys.executable, "-c", KILLED, url, str(files), job.id], check=False, timeout=300)
    assert (child.returncode, len(list(files.iterdir()))) == (-signal.SIGKILL, 1)
    (files / "of another service").touch()
    upkeep = upkeep_of(store, folder, Uploads(store, folder))
    upkeep.free()
    assert len(list(files.iterdir())) == 2  # a process that lives could still write
    monkeypatch.setattr(uploads, "MOST_S", 0.0)
    upkeep.free()
    assert [path.name for path in files.iterdir()] == ["of another service"]
    assert Uploads(store, folder).left() == []


def test_a_job_that_was_accepted_keeps_its_files_however_late_one_looks(
    store: Store, folder: Folder, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Uploads(store, folder)
    with noted.noted(job):
        folder.write(job.images["mask"], b"mask")
        accept(store, noted, job)
    monkeypatch.setattr(uploads, "MOST_S", 0.0)
    upkeep_of(store, folder, noted).free()
    noted.give_up(job.id)
    assert (tmp_path / "files" / job.images["mask"]).exists()


def test_a_job_that_another_process_gave_up_is_refused(
    store: Store, folder: Folder, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Uploads(store, folder)
    with pytest.raises(ApiError, match=r"^service\.folder: it took over .*; try again$"), noted.noted(job):
        folder.write(job.images["mask"], b"mask")
        with monkeypatch.context() as patch:
            patch.setattr(uploads, "MOST_S", 0.0)  # as if its clock were wrong
            upkeep_of(store, folder, Uploads(store, folder)).free()
        accept(store, noted, job)
    assert (store.get(job.id), list((tmp_path / "files").iterdir()), noted.left()) == (None, [], [])


@pytest.mark.parametrize("written", [False, True])
def test_of_a_job_that_the_database_failed_to_accept_it_is_asked_whether_it_did(
    store: Store, folder: Folder, tmp_path: Path, job: Job, *, written: bool
) -> None:
    noted = Uploads(store, folder)
    with pytest.raises(OperationalError), noted.noted(job):
        folder.write(job.images["mask"], b"mask")
        if written:
            accept(store, noted, job)
        raise OperationalError("COMMIT", None, Exception("the connection broke"))
    upkeep_of(store, folder, noted).free()
    assert (len(list((tmp_path / "files").iterdir())), noted.left()) == (int(written), [])
