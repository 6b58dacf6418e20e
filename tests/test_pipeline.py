"""The pipeline on a real local Ray: one set of replicas serves every test here."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import psutil
import pytest
import ray
import torch
from helpers import free_ports
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny.world import judge

from disagg_ray import Cancelled, LocalPipeline, Pipeline, Request, RequestError
from disagg_ray.config.schema import LimitsConfig
from disagg_ray.driver import outputs
from disagg_ray.driver.calls import Actor
from disagg_ray.driver.fleet import Fleet
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.latents import write_latents
from disagg_ray.media.video import quantise
from disagg_ray.replica.sizing import frame_bytes, frames_in_piece, most_piece_bytes

pytestmark = pytest.mark.slow

T2V = "conf/tiny_t2v.yaml"
PROMPT = "a red circle moving left"
SURE = 180.0
"""Seconds; what takes longer hangs."""
PROMPTS = [
    ("red", "circle", "left", "white"), ("red", "square", "right", "gray"), ("green", "triangle", "up", "black"),
    ("green", "circle", "down", "white"), ("blue", "square", "left", "black"), ("blue", "triangle", "right", "white"),
    ("yellow", "circle", "up", "gray"), ("yellow", "square", "down", "black"),
]  # fmt: skip
SMALL: dict[str, int] = {"num_frames": 9, "num_inference_steps": 4}
LONG = Request(prompt=PROMPT, height=128, width=128, num_frames=17, num_inference_steps=100, id="long")


@pytest.fixture(scope="module")
def pipeline(cluster: None) -> Iterator[Pipeline]:
    with Pipeline.from_config(T2V, f"transport.port_range={free_ports(400)}") as started:
        yield started


@pytest.fixture(scope="module")
def local() -> LocalPipeline:
    return LocalPipeline.from_config(T2V)


wait_until_empty = partial(helpers.wait_until_empty, timeout_s=SURE)


def wait_for_a_step(handle: Handle) -> None:
    """Wait until a request denoises."""
    helpers.wait_until(lambda: handle.progress is not None and handle.progress.step > 0, "no step was reported", SURE)


def test_split_frames_equal_local_frames(pipeline: Pipeline, local: LocalPipeline) -> None:
    request = Request(prompt=PROMPT, **SMALL, seed=7, height=48, width=80, format="npy")
    split, fused = pipeline.generate(request), local.generate(request)
    assert split.frames is not None
    assert split.frames.shape == (9, 48, 80, 3)
    assert np.array_equal(split.frames, fused.frames)
    wait_until_empty(pipeline)


def test_mp4_of_split_equals_mp4_of_local(pipeline: Pipeline, local: LocalPipeline) -> None:
    request = Request(prompt=PROMPT, **SMALL, seed=7)
    assert pipeline.generate(request).data == local.generate(request).data


def test_interleaved_requests_equal_each_alone(pipeline: Pipeline, local: LocalPipeline) -> None:
    requests = [
        Request(prompt=f"{PROMPT} {i}", seed=i, num_frames=9, num_inference_steps=2 + i % 3, format="npy")
        for i in range(6)
    ]
    results = {result.request.id: result for result in pipeline.generate_all(requests)}
    assert len(results) == 6
    for request in requests:
        assert np.array_equal(results[request.id].frames, local.generate(request).frames)
    wait_until_empty(pipeline)


def test_result_says_where_time_and_bytes_went(pipeline: Pipeline) -> None:
    result = pipeline.generate(Request(prompt=PROMPT, **SMALL, seed=7))
    assert [stage.stage for stage in result.stages] == ["encoder", "transformer", "decoder"]
    encoder, transformer, decoder = result.stages
    assert encoder.pulled_bytes == 0
    assert transformer.pulled_bytes > decoder.pulled_bytes > 0
    assert transformer.route == decoder.route == "tcp"
    assert all(stage.compute_s > 0 and stage.publish_s > 0 for stage in result.stages)
    assert sum(s.queue_s + s.pull_s + s.compute_s + s.publish_s for s in result.stages) <= result.seconds


def test_replicas_and_progress_listen_within_the_port_range(pipeline: Pipeline) -> None:
    """The driver's own pool need not here: Mooncake reads the range at a process's first engine."""
    receiver = pipeline.engine.receiver
    assert receiver is not None and receiver.credentials is not None
    names = [session for replica in pipeline.replicas for session in replica.sessions]
    numbers = [int(name.rpartition(":")[2]) for name in [*names, receiver.credentials.endpoint]]
    assert pipeline.config.transport.ports is not None
    assert len(numbers) == 4 and set(numbers) <= set(pipeline.config.transport.ports)


def test_a_negative_prompt_is_encoded_once(pipeline: Pipeline) -> None:
    before = pipeline.health()["encoder-0"]
    for prompt in ("a red circle", "a blue circle", "a green circle"):
        pipeline.generate(Request(prompt=prompt, negative_prompt="a square", **SMALL))
    after = pipeline.health()["encoder-0"]
    assert (after.cache_misses - before.cache_misses, after.cache_hits - before.cache_hits) == (4, 2)
    assert after.bytes_kept > 0
    wait_until_empty(pipeline)


def test_each_replica_holds_only_its_components(pipeline: Pipeline) -> None:
    held = {replica: sorted(weights) for replica, weights in pipeline.weights.items()}
    assert held == {"encoder-0": ["text_encoder"], "transformer-0": ["transformer"], "decoder-0": ["vae"]}


def test_a_failing_request_does_not_disturb_the_others(
    pipeline: Pipeline, local: LocalPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Request(prompt=PROMPT, **SMALL, seed=3, format="npy")
    long = Request(prompt="a red circle " * 100)
    monkeypatch.setattr("disagg_ray.pipeline.check_prompts", lambda *_: None)  # as where the tokenizer is elsewhere
    handles = [pipeline.submit(good), pipeline.submit(long), pipeline.submit(replace(good, id="again"))]
    with pytest.raises(RequestError, match="tokens are over the model's 32"):
        handles[1].result(SURE)
    expected = local.generate(good).frames
    assert all(np.array_equal(handles[i].result(SURE).frames, expected) for i in (0, 2))
    wait_until_empty(pipeline)


def test_no_video_is_made_of_numbers_that_are_not_finite(pipeline: Pipeline, local: LocalPipeline) -> None:
    said = r"transformer: its latents hold numbers that are not finite; lower the request's scales of guidance"
    for each in (pipeline, local):
        with pytest.raises(RequestError, match=said):
            each.generate(Request(prompt=PROMPT, guidance_scale=1e38, **SMALL))


def test_generate_all_raises_a_failure_after_all_others_are_done(pipeline: Pipeline) -> None:
    requests = [Request(prompt=PROMPT, **SMALL, seed=1), Request(prompt=""), Request(prompt=PROMPT, **SMALL, seed=2)]
    finished = []
    with pytest.raises(RequestError, match=r"^invalid prompt='': must say"):
        for result in pipeline.generate_all(requests):
            finished.append(result.request.seed)
    assert sorted(finished) == [1, 2]


def test_handle_can_be_awaited(pipeline: Pipeline) -> None:
    async def use() -> int:
        handle = pipeline.submit(Request(prompt=PROMPT, **SMALL, seed=11))
        return (await handle).request.seed

    assert asyncio.run(use()) == 11


def test_result_times_out_and_the_request_goes_on(pipeline: Pipeline) -> None:
    with helpers.stopped(pipeline.replicas[0].pid):  # or it might be done by then
        handle = pipeline.submit(Request(prompt=PROMPT, **SMALL, seed=11))
        with pytest.raises(TimeoutError):
            handle.result(0.001)
    assert handle.result(SURE).request.seed == 11


def test_cancel_stops_a_running_denoise_and_frees_its_slots(pipeline: Pipeline) -> None:
    handle = pipeline.submit(replace(LONG, height=256, width=256, num_frames=33))
    wait_for_a_step(handle)
    assert handle.cancel()
    with pytest.raises(Cancelled):
        handle.result(SURE)
    started = time.monotonic()
    pipeline.generate(Request(prompt=PROMPT, **SMALL, seed=1))
    assert time.monotonic() - started < 60, "the cancelled denoise still holds the replica"
    wait_until_empty(pipeline)


def test_a_process_at_work_is_titled_by_replica_and_call_and_never_by_request(pipeline: Pipeline) -> None:
    """Ray's metrics make a series of each title, permanently."""
    (pid,) = (replica.pid for replica in pipeline.replicas if replica.stage == "transformer")
    handle = pipeline.submit(LONG)
    helpers.wait_until(lambda: "transformer-0 run" in psutil.Process(pid).cmdline()[0], "it never ran", SURE)
    assert LONG.id not in psutil.Process(pid).cmdline()[0]
    handle.cancel()
    wait_until_empty(pipeline)


def test_who_is_interrupted_leaves_nothing_that_runs(pipeline: Pipeline) -> None:
    """As by Ctrl-C in a notebook, whose next cell uses the same pipeline."""
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        pipeline.generate(replace(LONG, height=256, width=256, num_frames=33))
    wait_until_empty(pipeline)


@pytest.mark.proof
def test_a_signal_at_any_moment_of_a_submit_leaves_the_pipeline_usable(pipeline: Pipeline) -> None:
    """Its handler raises between two instructions: a lock that is left taken would hang the event loop, or `close`."""
    received: list[int] = []

    def interrupt(signum: int, _: object) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    moments = np.random.default_rng(0).uniform(1e-4, 4e-3, 1_500)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number, moment in enumerate(moments, 1):
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, moment, 30.0)  # once more, should it hang
                pipeline.generate(Request(prompt=PROMPT, height=32, width=32, num_frames=5, num_inference_steps=1))
            assert len(received) == number
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pipeline.submit(Request(prompt=PROMPT, **SMALL)).result(SURE)
    wait_until_empty(pipeline)


@pytest.mark.proof
def test_whoever_waits_while_the_pipeline_closes_is_told(cluster: None) -> None:
    pipeline = Pipeline.from_config(T2V)
    handle, messages = pipeline.submit(LONG), []

    def ask() -> None:
        with pytest.raises(Cancelled) as caught:
            while True:
                pipeline.health()
        messages.append(str(caught.value))

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    pipeline.close()
    for thread in asking:
        thread.join(SURE)
    assert len(messages) == len(asking)
    with pytest.raises(Cancelled):
        handle.result(SURE)
    with pytest.raises(Cancelled, match="is closed"):
        pipeline.submit(LONG)


def cancel_task(name: str) -> None:
    """Cancel a request on the pipeline's own thread, in the midst of what runs there."""
    next(task for task in asyncio.all_tasks() if task.get_name() == f"request {name}").cancel()


@pytest.mark.parametrize("stage", ["encoder", "transformer", "decoder"])
def test_cancel_at_the_moment_a_stage_is_done_frees_its_slots(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    note_success = Fleet.note_success

    def cancel(self: Fleet, actor: Actor) -> None:
        note_success(self, actor)
        if actor.stage == stage:
            cancel_task("moment")

    monkeypatch.setattr(Fleet, "note_success", cancel)
    with pytest.raises(Cancelled):
        pipeline.generate(Request(prompt=PROMPT, **SMALL, seed=1, id="moment"))
    wait_until_empty(pipeline)


def test_latents_stay_as_they_are_while_they_are_written_for_a_cancelled_request(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    began, go = threading.Event(), threading.Event()

    def write(*arguments: Any) -> None:
        began.set()
        assert go.wait(SURE)
        write_latents(*arguments)

    monkeypatch.setattr(outputs, "write_latents", write)
    request = Request(prompt=PROMPT, **SMALL, seed=1, id="written")
    handle = pipeline.submit(request, latents_file=tmp_path / "latents")
    assert began.wait(SURE)
    for _ in range(2):  # as by a caller that does not wait, and then by the end of the pipeline
        pipeline.loop.call_soon(cancel_task, "written")
        time.sleep(0.2)  # the second finds it leaving
    with pytest.raises(Cancelled):
        handle.result(SURE)
    assert pipeline.driver_bytes_in_use > 0
    go.set()
    wait_until_empty(pipeline)
    assert (tmp_path / "latents").exists()


def test_latents_that_cannot_be_kept_fail_no_request(
    pipeline: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    request = Request(prompt=PROMPT, **SMALL, seed=1)
    made = pipeline.submit(request, latents_file=tmp_path / "file" / "latents").result(SURE)
    assert made.data == pipeline.generate(request).data
    assert "latents could not be kept in" in caplog.text
    wait_until_empty(pipeline)


def test_cancel_of_a_waiting_request_leaves_the_others(pipeline: Pipeline) -> None:
    handles = [pipeline.submit(Request(prompt=PROMPT, **SMALL, seed=i)) for i in range(8)]
    assert handles[-1].cancel()
    assert [handle.result(SURE).request.seed for handle in handles[:-1]] == list(range(7))
    assert handles[-1].done()
    wait_until_empty(pipeline)


def test_actor_names_carry_the_pipeline_and_reprs_the_replica(pipeline: Pipeline) -> None:
    actor = ray.get_actor(f"disagg_ray-{pipeline.id}-transformer-0")
    assert actor is not None
    assert "Transformer" in repr(actor)


def test_two_pipelines_in_one_cluster_do_not_collide(pipeline: Pipeline, image: Callable[..., Image.Image]) -> None:
    config = "conf/tiny_i2v.yaml"
    request = Request(prompt=PROMPT, **SMALL, image=image(90, 60), seed=5, format="npy")
    expected = LocalPipeline.from_config(config).generate(request).frames
    with Pipeline.from_config(config, "fused=true") as second:  # one replica more to start instead of three
        result = second.generate(request)
        assert np.array_equal(result.frames, expected)
        wait_until_empty(second)
    assert ray.is_initialized()
    assert pipeline.generate(Request(prompt=PROMPT, **SMALL, seed=1)).data


@pytest.mark.proof
def test_a_dead_replica_is_replaced_and_its_request_replayed(cluster: None, local: LocalPipeline) -> None:
    request = Request(prompt=PROMPT, num_frames=17, num_inference_steps=20, seed=3)
    with Pipeline.from_config(T2V, "fused=true") as short:
        handle = short.submit(request)
        wait_for_a_step(handle)
        os.kill(short.replicas[0].pid, signal.SIGKILL)
        result = handle.result(SURE)
        assert result.data == local.generate(request).data
        assert [timing.attempts for timing in result.stages] == [2]
        assert short.num_restarts == {"fused": 1}
        wait_until_empty(short)
        again = short.submit(LONG)
    with pytest.raises(Cancelled):
        again.result(SURE)
    with pytest.raises(Cancelled, match="closed"):
        short.submit(Request(prompt=PROMPT))
    short.close()


def test_prompts_are_obeyed_through_the_split_pipeline(pipeline: Pipeline) -> None:
    """A broken prompt path, a swapped negative prompt or an ignored seed draws something else."""
    scenes = {f"a {c} {s} moves {d} on a {b} background": (c, s, d, b) for c, s, d, b in PROMPTS}
    requests = [Request(prompt=prompt, seed=seed, format="npy") for seed, prompt in enumerate(scenes)]
    for result in pipeline.generate_all(requests):
        assert result.frames is not None
        seen = judge(torch.from_numpy(quantise(result.frames)))
        said = (seen.colour, seen.shape, seen.direction, seen.background)
        assert said == scenes[result.request.prompt]


@given(st.integers(1, 3600), st.integers(1, 40), st.integers(1, 3600), st.integers(1, 40))
def test_no_piece_of_frames_is_larger_than_its_slot(
    blocks: int, frames: int, most_blocks: int, most_frames: int
) -> None:
    """A smaller frame may make a larger piece: more of them fit into one."""
    limits = LimitsConfig(max_pixels=256 * max(blocks, most_blocks), max_frames=max(frames, most_frames))
    pixels = 256 * blocks
    assert frames_in_piece(pixels, frames) * frame_bytes(pixels) <= most_piece_bytes(limits)
