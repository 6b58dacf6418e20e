"""What is done about jobs that no request asks for: files are freed, and jobs end that nobody runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from disagg_ray.config.deployment import ServiceConfig
from disagg_ray.errors import OutputError
from disagg_ray.http.files import Folder, file_of
from disagg_ray.http.metrics import Metrics
from disagg_ray.http.queues import Queues
from disagg_ray.http.store import Job, Store
from disagg_ray.http.upkeep import Upkeep
from disagg_ray.http.uploads import Uploads


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(f"sqlite:///{tmp_path}/jobs.db")) as opened:
        opened.workers.become_one()
        yield opened


@pytest.fixture
def upkeep(store: Store, tmp_path: Path) -> Upkeep:
    """Give the upkeep of a service without models."""
    folder, config = Folder(str(tmp_path)), ServiceConfig(expires_after_s=60.0)
    return Upkeep(config, store, folder, Uploads(store, folder), {}, Queues(store, {}), Metrics())


def add(store: Store, name: str, **more: Any) -> Job:
    images = more.pop("images", {})
    settings = {"format": "mp4", "priority": 0}
    job = Job(name, "a", "gone", store.workers.own, "a cat", settings, images, "64x64", "1", time.time(), **more)
    with store.accepting("a") as accepting:
        accepting.add(job)
    return job


def test_a_file_that_cannot_be_removed_keeps_no_other_and_is_tried_again(
    upkeep: Upkeep, store: Store, tmp_path: Path
) -> None:
    held, other = (
        add(store, name, status="completed", completed_at=time.time(), num_bytes=1, expires_at=1.0) for name in "ab"
    )
    (tmp_path / file_of(other)).touch()
    (tmp_path / file_of(held) / "in use").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be removed"):
        upkeep.free()
    assert not (tmp_path / file_of(other)).exists()
    (tmp_path / file_of(held) / "in use").rmdir()
    (tmp_path / file_of(held)).rmdir()
    (tmp_path / file_of(held)).touch()
    upkeep.free()
    assert not (tmp_path / file_of(held)).exists()
    assert {job.num_bytes for job in store.page("a", None, 9, ascending=True)} == {0}


def test_a_file_that_two_replicas_free_at_once_is_no_failure(tmp_path: Path) -> None:
    folders = [Folder(str(tmp_path)) for _ in range(4)]
    with ThreadPoolExecutor(len(folders)) as pool:
        for number in range(500):
            (tmp_path / f"{number}.mp4").touch()
            list(pool.map(lambda folder, number=number: folder.remove(f"{number}.mp4"), folders))


def test_a_job_of_a_model_that_is_served_no_more_can_be_cancelled(upkeep: Upkeep, store: Store) -> None:
    job, kept = add(store, "a", status="cancelling", images={"image": "a.image"}), add(store, "b")
    upkeep.tend()
    ended = store.get(job.id)
    assert ended is not None and ended.completed_at is not None and ended.expires_at is not None
    assert (ended.status, store.get(kept.id)) == ("cancelled", kept)


def test_a_number_is_left_to_a_process_that_serves_its_jobs_model(upkeep: Upkeep, store: Store) -> None:
    with store.accepting("a") as accepting:
        accepting.add(Job("a", "a", "other", 7, "", {"priority": 0}, {}, "64x64", "1", time.time()))
    upkeep.tend()
    assert store.workers.numbers == {store.workers.own}
