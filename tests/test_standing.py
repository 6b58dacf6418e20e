"""A pipeline that stands, shared by many drivers, on a real local Ray: one serves every test here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import psutil
import pytest

from disagg_ray import Connection, LocalPipeline, Pipeline, Request, cli
from disagg_ray.environment import cache_folder
from disagg_ray.roster import find_replicas, standing

pytestmark = pytest.mark.slow

T2V = "conf/tiny_t2v.yaml"
NAME = "tests"
SMALL: dict[str, int] = {"num_frames": 9, "num_inference_steps": 4}
LONG = Request(prompt="a red circle", height=128, width=128, num_frames=17, num_inference_steps=100, id="long")
SETTINGS = ["standing.driver_timeout_s=4", "limits.max_queued=8", "stages.transformer.replicas=2"]


@pytest.fixture(scope="module")
def pipeline(cluster: None) -> Iterator[str]:
    """Give the name of the pipeline that stands; nothing of it may be left when it is down."""
    assert cli.main(["up", NAME, "--config", T2V, *SETTINGS]) == 0
    with Pipeline.connect(NAME) as connection:
        pids = [connection.snapshot().pid, *(replica.pid for replica in connection.replicas)]
    yield NAME
    assert cli.main(["down", NAME]) == 0
    assert (standing(), find_replicas(NAME)) == ([], {})
    assert not (cache_folder() / "standing" / NAME).exists()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "processes are left")


@pytest.fixture(scope="module")
def local() -> Callable[[Request], bytes]:
    """Give what the same stages make in one process."""
    alone = LocalPipeline.from_config(T2V)
    return cache(lambda request: alone.generate(request).data)


def wait_until(condition: Callable[[], bool], failure: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.1)


def is_empty(connection: Connection) -> bool:
    return not any(health.bytes_in_use for health in connection.health().values()) and not (
        connection.snapshot().driver_bytes_in_use
    )


def small(seed: int, **more: object) -> Request:
    return Request(prompt="a red circle moves left", seed=seed, **SMALL, **more)  # type: ignore[arg-type]


def test_results_equal_those_of_one_process(pipeline: str, local: Callable[[Request], bytes]) -> None:
    requests = [small(seed) for seed in range(4)]
    with Pipeline.connect(pipeline) as connection:
        results = {result.request.seed: result.data for result in connection.generate_all(requests)}
        assert results == {request.seed: local(request) for request in requests}
        raw = connection.generate(small(1, format="npy")).frames
        assert np.array_equal(raw, LocalPipeline.from_config(T2V).generate(small(1, format="npy")).frames)
        wait_until(lambda: is_empty(connection), "slots leaked")


def test_a_dead_supervisor_comes_back_to_its_replicas_and_loses_no_request(
    pipeline: str, local: Callable[[Request], bytes]
) -> None:
    with Pipeline.connect(pipeline) as connection:
        before = connection.snapshot()
        handles = [connection.submit(small(seed)) for seed in range(6)]
        os.kill(before.pid, signal.SIGKILL)
        assert [handle.result(120).data for handle in handles] == [local(small(seed)) for seed in range(6)]
        after = connection.snapshot()
        assert after.pid != before.pid
        assert {replica.pid for replica in after.replicas} == {replica.pid for replica in before.replicas}
        wait_until(lambda: is_empty(connection), "slots leaked")
