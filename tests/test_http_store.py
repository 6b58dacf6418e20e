"""The jobs' database: SQLite here; the same on PostgreSQL, which is started for it, in `make proof`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import helpers
import pytest

from disagg_ray.errors import ConfigError
from disagg_ray.http.store import DAY_S, UNFINISHED, Job, Store

SETTINGS = {"num_frames": 16, "fps": 16, "priority": 0}


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url)
    for job in opened.unfinished():  # of a test before
        opened.change(job.id, UNFINISHED, status="failed")
    yield opened
    opened.close()


def add(store: Store, name: str, tenant: str = "a", **more: Any) -> Job:
    job = Job(
        f"{name}-{time.time_ns()}", tenant, "wan", 0, "a cat", SETTINGS, {}, "64x64", "1",
        created_at=more.pop("created_at", time.time()), length_s=1.0, **more,
    )  # fmt: skip
    with store.accepting(tenant) as accepting:
        accepting.add(job)
    return job


def test_a_row_is_there_for_the_next_process(store: Store, url: str) -> None:
    job = add(store, "kept")
    other = Store(url)
    assert other.get(job.id) == job
    other.close()


def test_an_id_that_is_no_text_is_nobody_s(store: Store) -> None:
    assert store.get("video_\0") is None


def test_a_job_ends_once(store: Store) -> None:
    job = add(store, "once")
    assert store.change(job.id, UNFINISHED, status="completed", progress=100)
    assert not store.change(job.id, UNFINISHED, status="failed")
    assert store.get(job.id) == replace(job, status="completed", progress=100)


def test_a_tenant_sees_its_own_jobs_only_and_no_deleted_ones(store: Store) -> None:
    tenant = f"t{time.time_ns()}"
    job, gone = add(store, "mine", tenant), add(store, "gone", tenant)
    store.change(gone.id, UNFINISHED, status="deleted")
    assert [each.id for each in store.page(tenant, None, 10, ascending=True)] == [job.id]
    assert (store.get(job.id, "other"), store.get(gone.id, tenant)) == (None, None)


def test_pages_follow_each_other_though_jobs_came_at_one_time(store: Store) -> None:
    tenant = f"t{time.time_ns()}"
    made = sorted(add(store, "same", tenant, created_at=1.0).id for _ in range(5))
    first = store.page(tenant, None, 3, ascending=True)
    rest = store.page(tenant, first[-1], 3, ascending=True)
    assert [job.id for job in first + rest] == made


def test_a_page_goes_on_after_a_job_that_was_deleted_since_however_old(store: Store) -> None:
    tenant = f"t{time.time_ns()}"
    newer, older = (add(store, name, tenant, created_at=created) for name, created in (("b", 2.0), ("a", 1.0)))
    assert store.delete(newer.id)
    store.forget_deleted(time.time())
    last = store.cursor(newer.id, tenant)
    assert last is not None and store.cursor(newer.id, "other") is None
    assert store.page(tenant, last, 3, ascending=False) == [older]
    store.forget_deleted(time.time() + DAY_S)
    assert store.cursor(newer.id, tenant) is None


def test_two_posts_of_one_idempotency_key_at_once_make_one_job(store: Store) -> None:
    tenant, barrier, found = f"t{time.time_ns()}", Barrier(2), list[str]()

    def post() -> None:
        barrier.wait()
        with store.accepting(tenant) as accepting:
            if (job := accepting.find("key")) is None:
                job = Job(f"j{time.time_ns()}", tenant, "wan", 0, "", SETTINGS, {}, "", "", 0.0, idempotency_key="key")
                accepting.add(job)
        found.append(job.id)

    threads = [Thread(target=post) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found))) == (2, 1)


def test_usage_counts_a_day_and_what_is_unfinished(store: Store) -> None:
    tenant = f"t{time.time_ns()}"
    add(store, "now", tenant)
    add(store, "before", tenant, created_at=time.time() - 100_000)
    failed = add(store, "failed", tenant)
    store.change(failed.id, UNFINISHED, status="failed", error_code="internal_error")
    with store.accepting(tenant) as accepting:
        assert (accepting.in_flight(), accepting.seconds_today()) == (2, 1.0)


def test_a_worker_number_is_one_processs_until_it_ends(store: Store, url: str) -> None:
    assert store.workers.take(7)
    other = Store(url)
    assert (other.workers.take(7), other.workers.take(8)) == (False, True)
    other.close()
    helpers.wait_until(lambda: store.workers.take(8), "a number stays with a process that ended", 60.0)


@pytest.mark.parametrize("url", ["nothing", "sqlite:////proc/none/jobs.db", "oracle://x"])
def test_a_database_that_cannot_be_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^invalid service\.database="):
        Store(url)
