"""Replicas die, hang and stall at exact moments; every video comes out as if nothing had been, at the least cost.

One set of replicas serves nearly every test; after each, `pipeline` waits until all serve again and hold nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import helpers
import psutil
import pytest
import ray
from faulty import RESUMED, Faults
from peer import fill

from disagg_ray import Cancelled, LocalPipeline, Overloaded, Pipeline, Request, StageError, StartError, load_config
from disagg_ray.driver.pool import DriverPool
from disagg_ray.errors import ReplicaLost
from disagg_ray.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.proof

T2V = "conf/tiny_t2v.yaml"
SURE = 300.0
"""Seconds; what takes longer hangs."""
ONCE = {"encoder": 1, "transformer": 1, "decoder": 1}


def ask(name: str, *, steps: int = 6) -> Request:
    return Request("a red circle", seed=5, height=32, width=32, num_frames=5, num_inference_steps=steps, id=name)


@pytest.fixture(scope="module")
def started(cluster: None, faults: Faults) -> Iterator[Pipeline]:
    settings = ["stages.transformer.replicas=2", "failures.stall_s=15", "failures.max_attempts=2"]
    with Pipeline.from_config(T2V, *settings, "limits.max_queued=2", "transport.timeout_s=10") as pipeline:
        yield pipeline


@pytest.fixture
def pipeline(started: Pipeline) -> Iterator[Pipeline]:
    yield started
    wait_until(lambda: len(started.replicas) == 4, "a replica did not come back")
    wait_until_empty(started)
    wait_until(lambda: not any(h.num_videos for h in started.health().values()), "a decoder keeps frames")


@pytest.fixture(scope="module")
def video() -> Callable[[int], bytes | None]:
    """Give the undisturbed video by its number of steps."""
    local = LocalPipeline.from_config(T2V)
    return cache(lambda steps=6: local.generate(ask("local", steps=steps)).data)


wait_until = partial(helpers.wait_until, timeout_s=SURE)
wait_until_empty = partial(helpers.wait_until_empty, timeout_s=SURE)


def pid_of(pipeline: Pipeline, name: str) -> int:
    return next(replica.pid for replica in pipeline.replicas if replica.name == name)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not helpers.lives(pid), f"{pid} lives")


def at_copy(monkeypatch: pytest.MonkeyPatch, strike: Callable[[str], None], *, after: bool) -> None:
    """Have `strike` called with the producer's name, once, right before or after the driver copies its latents."""
    hold, left = DriverPool.hold, [strike]

    async def striking(self: DriverPool, key: Any, handoff: Any) -> Any:
        if not after and left:
            left.pop()(handoff.producer)
        held = await hold(self, key, handoff)
        if after and left:
            left.pop()(handoff.producer)
        return held

    monkeypatch.setattr(DriverPool, "hold", striking)


@pytest.mark.parametrize(
    ("stage", "point", "again"),
    [
        ("encoder", "publish", {"encoder": 2}),
        ("encoder", "release", {}),
        ("transformer", "pull", {}),
        ("transformer", "step", {"transformer": 2}),
        ("transformer", "publish", {"transformer": 2}),
        ("transformer", "release", {}),
        ("decoder", "pull", {}),
        ("decoder", "publish", {"decoder": 2}),
        ("decoder", "release", {}),
    ],
)
def test_a_replica_that_dies_costs_what_it_had_not_handed_over(
    pipeline: Pipeline, faults: Faults, video: Any, stage: str, point: str, again: dict[str, int]
) -> None:
    before, name = pipeline.num_restarts[stage], f"{stage}-{point}"
    faults.set(f"{stage}.{point}", "die")
    result = pipeline.submit(ask(name)).result(SURE)
    assert result.data == video(6)
    assert {timing.stage: timing.attempts for timing in result.stages} == ONCE | again
    wait_until(lambda: pipeline.num_restarts[stage] == before + 1, "nothing died, or it did not come back")


def test_an_encoder_that_dies_before_its_output_is_pulled_costs_an_encode(
    pipeline: Pipeline, faults: Faults, video: Any
) -> None:
    faults.set("transformer.pull", "wait")
    handle = pipeline.submit(ask("lost-embeddings"))
    faults.await_arrival("transformer.pull")
    kill(pid_of(pipeline, "encoder-0"))
    faults.clear("transformer.pull")
    assert handle.result(SURE).data == video(6)
    assert faults.times_computed("lost-embeddings") == ONCE | {"encoder": 2}


def lose_uncopied(pipeline: Pipeline, faults: Faults, video: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Kill the transformer right before the driver copies its latents; check that they are computed again."""
    faults.set("decoder.pull", "wait")
    at_copy(monkeypatch, lambda producer: kill(pid_of(pipeline, producer)), after=False)
    handle = pipeline.submit(ask(name))
    faults.await_arrival("decoder.pull")
    faults.clear("decoder.pull")
    assert handle.result(SURE).data == video(6)
    assert faults.times_computed(name) == ONCE | {"transformer": 2}


def test_a_transformer_that_dies_between_denoise_and_copy_costs_a_denoise(
    pipeline: Pipeline, faults: Faults, video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_uncopied(pipeline, faults, video, monkeypatch, "before-copy")


def test_a_transformer_that_dies_while_the_copy_waits_for_room_costs_a_denoise(
    pipeline: Pipeline, faults: Faults, video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipeline.engine.driver_pool is not None
    pool = pipeline.engine.driver_pool._pool
    filling = fill(pool)
    try:
        lose_uncopied(pipeline, faults, video, monkeypatch, "no-copy")
    finally:
        pool.release(filling)


def test_a_transformer_that_dies_between_copy_and_decode_costs_nothing(
    pipeline: Pipeline, faults: Faults, video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strike(producer: str) -> None:
        kill(pid_of(pipeline, producer))
        faults.clear("decoder.pull")

    faults.set("decoder.pull", "wait")
    at_copy(monkeypatch, strike, after=True)
    assert pipeline.submit(ask("after-copy")).result(SURE).data == video(6)
    assert faults.times_computed("after-copy") == ONCE


def test_a_decoder_killed_by_ray_costs_a_decode(pipeline: Pipeline, faults: Faults, video: Any) -> None:
    faults.set("decoder.publish", "wait")
    handle = pipeline.submit(ask("ray-kill"))
    faults.await_arrival("decoder.publish")
    ray.kill(next(actor.handle for actor in pipeline.engine.fleet.actors if actor.stage == "decoder"))
    faults.clear("decoder.publish")
    assert handle.result(SURE).data == video(6)
    assert faults.times_computed("ray-kill") == ONCE | {"decoder": 2}


def test_an_idle_encoder_that_dies_is_not_missed(pipeline: Pipeline, faults: Faults, video: Any) -> None:
    kill(pid_of(pipeline, "encoder-0"))
    assert pipeline.submit(ask("idle")).result(SURE).data == video(6)
    assert faults.times_computed("idle") == ONCE


def test_a_replica_that_is_lost_on_the_way_to_it_is_lost_to_whoever_asks(pipeline: Pipeline) -> None:
    with pytest.raises(ReplicaLost, match=r"transformer-0\.99 was lost before it was reached"):
        pipeline.engine.fleet.actor("transformer-0.99")


def test_a_transformer_that_dies_while_prefetching_costs_what_it_computed(
    pipeline: Pipeline, faults: Faults, video: Any
) -> None:
    names = [f"prefetch-{number}" for number in range(6)]
    faults.set("transformer.prefetch", "die")
    handles = [pipeline.submit(ask(name, steps=30)) for name in names]
    assert all(handle.result(SURE).data == video(30) for handle in handles)
    denoised = Counter(faults.times_computed(name)["transformer"] for name in names)
    assert denoised in ({1: 5, 2: 1}, {1: 6})


def test_a_stopped_decoder_is_replaced(pipeline: Pipeline, faults: Faults, video: Any) -> None:
    faults.set("decoder.pull", "wait")
    handle, pid = pipeline.submit(ask("stopped")), pid_of(pipeline, "decoder-0")
    faults.await_arrival("decoder.pull")
    helpers.stop(pid)
    faults.clear("decoder.pull")
    result = handle.result(SURE)
    assert result.data == video(6)
    assert [timing.attempts for timing in result.stages] == [1, 1, 1]  # it had not begun to compute
    wait_until(lambda: not psutil.pid_exists(pid), "the stopped process is still there")


def test_a_transformer_that_stops_between_denoise_and_copy_costs_a_denoise(
    pipeline: Pipeline, faults: Faults, video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's copy runs out of time: its slot is set aside until that replica is dead."""
    at_copy(monkeypatch, lambda producer: helpers.stop(pid_of(pipeline, producer)), after=False)
    assert pipeline.submit(ask("silent")).result(SURE).data == video(6)
    assert faults.times_computed("silent") == ONCE | {"transformer": 2}


def test_a_denoise_without_a_step_is_given_to_another(pipeline: Pipeline, faults: Faults, video: Any) -> None:
    faults.set("transformer.step", "stall")
    result = pipeline.submit(ask("stall")).result(SURE)
    assert result.data == video(6)
    assert [timing.attempts for timing in result.stages] == [1, 2, 1]


@pytest.mark.parametrize("where", ["transformer.publish", "decoder.pull"])
def test_a_hang_outside_of_computing_is_found_too(pipeline: Pipeline, faults: Faults, video: Any, where: str) -> None:
    stage, before = where.partition(".")[0], pipeline.num_restarts
    faults.set(where, "stall")
    result = pipeline.submit(ask(f"hung-{where}")).result(SURE)
    assert result.data == video(6)
    again = {} if where.endswith("pull") else {stage: 2}  # what hangs before it computes costs no attempt
    assert {timing.stage: timing.attempts for timing in result.stages} == ONCE | again
    wait_until(lambda: pipeline.num_restarts[stage] == before[stage] + 1, "it was not replaced")


def test_a_request_that_kills_its_replica_fails_alone(pipeline: Pipeline, faults: Faults, video: Any) -> None:
    faults.set("transformer.compute.deadly", "die always")
    names = ["harmless-0", "deadly", "harmless-1", "harmless-2"]
    handles = {name: pipeline.submit(ask(name)) for name in names}
    with pytest.raises(StageError, match=r"transformer failed 2 times \(failures.max_attempts\).*replica died"):
        handles.pop("deadly").result(SURE)
    assert all(handle.result(SURE).data == video(6) for handle in handles.values())
    assert faults.times_computed("deadly") == {"encoder": 1, "transformer": 2}


@pytest.mark.parametrize("where", ["transformer.pull", "transformer.publish", "decoder.publish"])
def test_a_late_answer_of_a_cancelled_request_changes_nothing(
    pipeline: Pipeline, faults: Faults, video: Any, where: str
) -> None:
    faults.set(where, "wait")
    handle = pipeline.submit(ask(f"late-{where}"))
    faults.await_arrival(where)
    assert handle.cancel()
    with pytest.raises(Cancelled):
        handle.result(SURE)
    wait_until_empty(pipeline)  # before the answer
    faults.clear(where)
    assert pipeline.submit(ask(f"after-late-{where}")).result(SURE).data == video(6)


def test_a_request_over_its_time_fails_and_frees_its_slots(
    pipeline: Pipeline, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = replace(pipeline.config.failures, timeout_s=0.5)
    launcher = pipeline.engine.fleet.launcher
    monkeypatch.setattr(launcher, "spec", replace(launcher.spec, config=replace(pipeline.config, failures=failures)))
    faults.set("encoder.publish", "wait")
    handle = pipeline.submit(ask("over-time"))
    with pytest.raises(StageError, match=r"not done within failures.timeout_s=0.5 s"):
        handle.result(SURE)
    faults.clear("encoder.publish")


def test_a_full_queue_refuses_who_would_not_wait(pipeline: Pipeline, faults: Faults, video: Any) -> None:
    faults.set("encoder.publish", "wait")
    handles = [pipeline.submit(ask(f"queued-{n}")) for n in range(pipeline.config.max_in_flight + 2)]
    with pytest.raises(Overloaded, match=r"limits.max_queued: 2 requests wait already"):
        pipeline.submit(ask("refused"), wait=False)
    faults.clear("encoder.publish")
    assert all(handle.result(SURE).data == video(6) for handle in handles)


def test_latents_of_a_killed_driver_are_decoded_by_the_next(
    pipeline: Pipeline, faults: Faults, video: Any, tmp_path: Path
) -> None:
    latents, theirs = tmp_path / "work" / "latents", Faults(tmp_path)
    theirs.set("decoder.publish", "wait")
    command = [sys.executable, str(Path(__file__).with_name("faulty.py")), str(tmp_path), str(latents)]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen(command, env=os.environ | address, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    wait_until(latents.exists, "no latents were kept")
    kill(driver.pid)
    driver.wait()
    result = pipeline.submit(RESUMED, latents_file=latents).result(SURE)
    assert result.data == video(6)
    assert [timing.stage for timing in result.stages] == ["decoder"]
    assert faults.times_computed(RESUMED.id or "") == {"decoder": 1}
    assert len(pids) == 3
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "the dead driver's replicas live on")


def test_a_stage_that_cannot_start_again_ends_the_run_with_the_reason(
    cluster: None, faults: Faults, tmp_path: Path
) -> None:
    model = open_checkpoint(load_config(T2V).model).folder
    folder = tmp_path / "model"
    subprocess.run(["cp", "-rL", model, folder], check=True)
    faults.set("fused.compute", "wait")
    with Pipeline.from_config(T2V, "fused=true", f"model.path={folder}") as doomed:
        handles = [doomed.submit(ask(f"doomed-{number}")) for number in range(4)]
        faults.await_arrival("fused.compute")
        folder.rename(tmp_path / "gone")
        kill(doomed.replicas[0].pid)
        for handle in handles:
            with pytest.raises(StartError, match=r"no replica of fused is left and none starts: .*model\.path"):
                handle.result(SURE)
        with pytest.raises(StartError, match="no replica of fused is left"):
            doomed.submit(ask("too-late"))
    faults.clear("fused.compute")


def test_drain_finishes_what_runs_and_close_leaves_nothing_behind(
    started: Pipeline, faults: Faults, video: Any
) -> None:
    pids, shared = [replica.pid for replica in started.replicas], helpers.shared_memory_left()
    faults.set("encoder.publish", "wait")
    handles = [started.submit(ask(f"drained-{n}")) for n in range(started.config.max_in_flight + 1)]
    faults.await_arrival("encoder.publish")
    with ThreadPoolExecutor(1) as thread:
        draining = thread.submit(started.drain, SURE)
        wait_until(handles[-1].done, "what waits is not cancelled")
        faults.clear("encoder.publish")
        draining.result(SURE)
    assert all(handle.result(SURE).data == video(6) for handle in handles[:-1])
    with pytest.raises(Cancelled):
        handles[-1].result(SURE)
    with pytest.raises(Cancelled, match="closed"):
        started.submit(ask("too-late"))
    started.close()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "a replica outlives its pipeline")
    wait_until(lambda: helpers.shared_memory_left() <= shared, "shared memory is left")
