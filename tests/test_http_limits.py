"""What a key may ask for, and how much may wait, on each database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from threading import Thread

import pytest

from disagg_ray.http.keys import Key
from disagg_ray.http.limits import check_limits
from disagg_ray.http.schema import ApiError
from disagg_ray.http.store import UNFINISHED, Job, Store

SETTINGS = {"format": "mp4", "priority": 0}
VIDEO = Job("", "", "wan", 0, "a cat", SETTINGS, {}, "64x64", "4", 0.0, length_s=4.0)
IMAGE = replace(VIDEO, settings=SETTINGS | {"format": "png"}, seconds="0", length_s=0.0)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with closing(Store(url)) as opened:
        for job in opened.unfinished():  # of a test before
            opened.change(job.id, UNFINISHED, status="failed")
        yield opened


def accept(store: Store, key: Key, asked: Job, max_queued: int = 100) -> Job:
    job = replace(asked, id=f"j{time.time_ns()}", tenant=key.name, created_at=time.time())
    with store.accepting(key.name) as accepting:
        check_limits(accepting, key, job, max_queued, None)
        accepting.add(job)
    return job


def refusal(store: Store, key: Key, asked: Job, max_queued: int = 100) -> tuple[int, str | None, str]:
    with pytest.raises(ApiError) as caught:
        accept(store, key, asked, max_queued)
    assert int((caught.value.headers or {})["Retry-After"]) >= 1
    return caught.value.status, caught.value.code, caught.value.message.partition(" a day ")[0]


def test_images_and_seconds_of_video_have_a_limit_a_day_each(store: Store) -> None:
    key = Key(f"t{time.time_ns()}", seconds_a_day=5.0, images_a_day=2)
    failed, gone = accept(store, key, IMAGE), accept(store, key, IMAGE)
    for job in (failed, gone):  # count for nothing
        store.change(job.id, UNFINISHED, status="failed", error_code="deadline_exceeded")
    store.delete(gone.id)
    for _ in range(2):
        deleted = accept(store, key, IMAGE)
        store.delete(deleted.id)
    assert refusal(store, key, IMAGE) == (429, "daily_limit", "2 images")
    accept(store, key, VIDEO)
    assert refusal(store, key, VIDEO) == (429, "daily_limit", "5 seconds of video")
    assert refusal(store, key, IMAGE) == (429, "daily_limit", "2 images")


def test_a_key_s_own_jobs_and_a_model_s_are_limited(store: Store) -> None:
    key, other = (Key(f"{name}{time.time_ns()}", max_in_flight=1) for name in "ab")
    accept(store, key, VIDEO)
    assert refusal(store, key, IMAGE)[:2] == (429, "too_many_in_flight")
    assert refusal(store, other, IMAGE, max_queued=1)[:2] == (429, "queue_full")
    accept(store, other, IMAGE)


def test_of_two_tenants_that_post_at_once_the_later_counts_the_earlier_s_job(store: Store) -> None:
    counted = list[int]()

    def count() -> None:
        with store.accepting("later") as accepting:
            counted.append(accepting.count(VIDEO.model))

    later = Thread(target=count)
    with store.accepting("earlier") as accepting:
        accepting.add(replace(VIDEO, id=f"j{time.time_ns()}", tenant="earlier"))
        later.start()
        later.join(1.0)  # it waits
    later.join()
    assert counted == [1]
