"""Replicas that die or live and fail in the middle of a batch: every request of it is served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import helpers
import psutil
import pytest
import ray
from faulty import Faults

from disagg_ray import LocalPipeline, Pipeline, Request, Result, StageError
from disagg_ray.driver.calls import AGAIN_S

pytestmark = pytest.mark.slow

T2V = "conf/tiny_t2v.yaml"
SURE = 200.0
"""Seconds; what takes longer hangs."""
NUM_REQUESTS = 12

wait_until = partial(helpers.wait_until, timeout_s=SURE)


def ask(name: str) -> Request:
    return Request("a red circle", seed=5, height=32, width=32, num_frames=5, num_inference_steps=2, id=name)


def batch(name: str) -> list[Request]:
    return [ask(f"{name}-{number}") for number in range(NUM_REQUESTS)]


@pytest.fixture(scope="module")
def started(cluster: None, faults: Faults) -> Iterator[Pipeline]:
    with Pipeline.from_config(T2V, "fused=true", "stages.transformer.replicas=2") as pipeline:
        yield pipeline


@pytest.fixture
def pipeline(started: Pipeline) -> Iterator[Pipeline]:
    yield started
    wait_until(lambda: len(started.replicas) == 2, "a replica did not come back")


@pytest.fixture(scope="module")
def video() -> bytes | None:
    return LocalPipeline.from_config(T2V).generate(ask("local")).data


def serve(pipeline: Pipeline, requests: list[Request], video: bytes | None) -> Counter[int]:
    """Return how many requests took how many attempts."""
    results: list[Result] = list(pipeline.generate_all(requests))
    assert {result.request.id: result.data for result in results} == {request.id: video for request in requests}
    return Counter(result.stages[0].attempts for result in results)


def test_a_replica_that_lives_and_fails_costs_no_request(
    pipeline: Pipeline, faults: Faults, video: bytes | None
) -> None:
    faults.set("fused.compute", "break")
    attempts = serve(pipeline, batch("broken"), video)
    assert set(attempts) == {1, 2}
    wait_until(lambda: pipeline.num_restarts["fused"] == 1, "the broken replica was not replaced")


@pytest.mark.quick
def test_a_replica_that_dies_in_mid_batch_costs_its_request_an_attempt(
    pipeline: Pipeline, faults: Faults, video: bytes | None
) -> None:
    before = pipeline.num_restarts["fused"]
    faults.set("fused.step", "die")
    assert serve(pipeline, batch("killed"), video) == {1: NUM_REQUESTS - 1, 2: 1}
    wait_until(lambda: pipeline.num_restarts["fused"] == before + 1, "the dead replica was not replaced")


def test_a_replica_with_a_poisoned_process_ends(pipeline: Pipeline, faults: Faults, video: bytes | None) -> None:
    pids, before = {replica.pid for replica in pipeline.replicas}, pipeline.num_restarts["fused"]
    faults.set("fused.compute", "poison")
    assert serve(pipeline, batch("poisoned"), video) == {1: NUM_REQUESTS - 1, 2: 1}
    wait_until(lambda: pipeline.num_restarts["fused"] == before + 1, "the poisoned replica was not replaced")
    wait_until(lambda: sum(map(psutil.pid_exists, pids)) == 1, "its process lives")


def test_a_request_that_fails_everywhere_fails_alone_and_costs_no_replica(
    pipeline: Pipeline, faults: Faults, video: bytes | None
) -> None:
    pids = {replica.pid for replica in pipeline.replicas}
    faults.set("fused.compute.bad", "fail always")
    bad = pipeline.submit(ask("bad"))
    assert serve(pipeline, batch("good"), video) == {1: NUM_REQUESTS}
    with pytest.raises(StageError, match=r"fused failed 3 times \(failures.max_attempts\).*this request fails"):
        bad.result(SURE)
    assert {replica.pid for replica in pipeline.replicas} == pids


@pytest.mark.proof
def test_a_replica_that_cannot_be_reached_for_a_moment_is_asked_again(cluster: None, tmp_path: Path) -> None:
    most = len(AGAIN_S)  # or one call in several hundred would be lost each time
    dropped = {"num_failures": most, "req_failure_prob": 20, "resp_failure_prob": 20, "in_flight_failure_prob": 0}
    blips = {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": dropped}),
    }
    command = [sys.executable, str(Path(__file__).with_name("blips.py")), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | blips, capture_output=True, text=True, timeout=SURE, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert int(done.stdout) > 0
