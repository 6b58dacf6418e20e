"""Latents that are kept for drivers that may come back."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch

from disagg_ray.driver.latents import write_latents
from disagg_ray.media.places import TEMPORARY
from disagg_ray.service.latents_store import LatentsStore


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def fill(keep: LatentsStore, run_id: str, request_id: str, nbytes: int = 10, age_s: float = 0.0) -> Path:
    path = keep.file(run_id, request_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * nbytes)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_each_request_of_each_run_has_its_own_file_within_the_folder(cache: Path) -> None:
    keep = LatentsStore("wan", 100, 60)
    names = {keep.file(run_id, request_id) for run_id in ("a", "../..") for request_id in ("1", "/etc/passwd")}
    assert len(names) == 4
    assert all(cache in path.parents and ".." not in path.parts for path in names)


def test_the_oldest_give_way_when_there_are_too_many_bytes() -> None:
    keep = LatentsStore("wan", 25, 60)
    paths = [fill(keep, "run", str(age), age_s=age) for age in (30, 20, 10)]
    keep.evict()
    assert [path.exists() for path in paths] == [False, True, True]


def test_what_is_too_old_goes() -> None:
    keep = LatentsStore("wan", 100, 60)
    old, young = fill(keep, "run", "old", age_s=61), fill(keep, "run", "young", age_s=1)
    keep.evict()
    assert (old.exists(), young.exists()) == (False, True)


def test_folders_of_runs_that_left_nothing_go_when_they_are_old() -> None:
    keep = LatentsStore("wan", 100, 60)
    old, young, full = (fill(keep, run, "1").parent for run in ("old", "young", "full"))
    keep.drop("old", "1")
    keep.drop("young", "1")
    for folder in (old, full):
        os.utime(folder, (time.time() - 61,) * 2)
    keep.evict()
    assert [folder.exists() for folder in (old, young, full)] == [False, True, True]


def test_evicting_races_neither_writers_nor_droppers(caplog: pytest.LogCaptureFixture) -> None:
    keep, ended = LatentsStore("wan", 20_000, 60), threading.Event()

    def write(run_id: str) -> None:
        for number in range(60):
            write_latents(keep.file(run_id, str(number)), torch.zeros(100), {})
            keep.drop(run_id, [str(number - 20)])

    def evict() -> None:
        while not ended.is_set():
            keep.evict()

    with ThreadPoolExecutor(4) as threads:
        evicting = [threads.submit(evict) for _ in range(2)]
        writing = [threads.submit(write, run_id) for run_id in ("a", "b")]
        wait(writing, 300)
        ended.set()
        [writer.result(0) for writer in writing]
        [each.result(60) for each in evicting]
    assert not caplog.messages


def test_a_file_that_is_being_written_counts_for_nothing_until_its_writer_is_long_dead() -> None:
    keep = LatentsStore("wan", 25, 60)
    whole = fill(keep, "run", "1", 20, age_s=30)
    young, old = (whole.with_name(f"{TEMPORARY}{age}") for age in (20, 70))
    for path, age in ((young, 20), (old, 70)):
        path.write_bytes(b"x" * 20)
        os.utime(path, (time.time() - age,) * 2)
    keep.evict()
    assert [path.exists() for path in (whole, young, old)] == [True, True, False]


def test_what_is_dropped_and_cleared_is_gone(cache: Path) -> None:
    keep, other = LatentsStore("wan", 100, 60), LatentsStore("other", 100, 60)
    path, kept = fill(keep, "run", "1"), fill(other, "run", "1")
    keep.drop("run", ["1"])
    keep.drop("run", ["1"])
    assert not path.exists()
    fill(keep, "run", "2")
    keep.clear()
    assert [path for path in cache.rglob("*") if path.is_file()] == [kept]
