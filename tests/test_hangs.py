"""What hangs is found and replaced, what fails in the background resumes, and nothing waits for itself.

One replica serves every test; each leaves it serving.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import helpers
import psutil
import pytest
from faulty import Faults

from disagg_ray import LocalPipeline, Pipeline, Request, StageError
from disagg_ray.driver import runner
from disagg_ray.driver.handle import Handle
from disagg_ray.replica.messages import Spec

pytestmark = pytest.mark.slow

T2V = "conf/tiny_t2v.yaml"
SURE = 180.0
wait_until = partial(helpers.wait_until, timeout_s=SURE)


def ask(name: str) -> Request:
    return Request("a red circle", seed=5, height=32, width=32, num_frames=5, num_inference_steps=2, id=name)


@pytest.fixture(scope="module")
def pipeline(cluster: None, faults: Faults) -> Iterator[Pipeline]:
    with Pipeline.from_config(T2V, "fused=true", "failures.answer_s=12") as pipeline:  # looks every 3 s
        yield pipeline


def set_config(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, **changes: Any) -> None:
    """Change the configuration of the fleet without starting anything."""
    fleet = pipeline.engine.fleet
    monkeypatch.setattr(fleet.launcher, "spec", Spec(0, replace(fleet.config, **changes)))


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, when: str = "") -> threading.Event:
    """Have the next call raise an unexpected error; return an event that is set once a later call succeeds."""
    call, failures, again = getattr(owner, name), ["unforeseen"], threading.Event()

    def failing(*args: Any) -> Any:
        if when in ("", *args[1:]):
            if failures:
                raise RuntimeError(failures.pop())
            again.set()
        return call(*args)

    monkeypatch.setattr(owner, name, failing)
    return again


def test_background_tasks_that_fail_are_logged_and_go_on(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted: list[str] = []
    monkeypatch.setattr(
        pipeline.engine.metrics, "_count", lambda name, amount, **tags: counted.append(tags.get("task", ""))
    )
    looked_again = fail_once(monkeypatch, runner, "ask_within", when="health")
    counted_again = fail_once(monkeypatch, pipeline.engine.metrics, "refresh")
    assert looked_again.wait(SURE) and counted_again.wait(SURE)
    assert {"fleet_watch", "count"} <= set(counted)
    assert "background task fleet_watch failed; it is started again" in caplog.text
    assert "background task count failed; it is started again" in caplog.text


def test_a_hung_encode_is_replaced_and_its_request_finishes(
    pipeline: Pipeline, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The watch that failed above finds it."""
    faults.set("fused.encode", "stall")
    handle = pipeline.submit(ask("hung"))
    faults.await_arrival("fused.encode")
    failures = replace(pipeline.engine.fleet.config.failures, stall_s=4.0)  # a replica has as long to say how it is
    set_config(monkeypatch, pipeline, failures=failures)
    wait_until(lambda: not pipeline.replicas, "it was not found")
    monkeypatch.undo()
    assert handle.result(SURE).data == LocalPipeline.from_config(T2V).generate(ask("local")).data
    assert pipeline.num_restarts == {"fused": 1}
    assert "fused-0: no progress of its encode for failures.stall_s=4 s" in caplog.text


def test_what_would_wait_for_the_pipelines_own_thread_raises_there(pipeline: Pipeline, faults: Faults) -> None:
    told: Future[list[str]] = Future()
    faults.set("fused.compute.first", "wait")
    faults.set("fused.compute.other", "wait")
    first, other = pipeline.submit(ask("first")), pipeline.submit(ask("other"))

    def use(handle: Handle) -> None:
        calls = (lambda: pipeline.submit(ask("more")), other.result, pipeline.health, lambda: pipeline.drain(0),
                 pipeline.close)  # fmt: skip
        said = []
        for call in calls:
            with pytest.raises(RuntimeError) as caught:
                call()
            said.append(str(caught.value))
        told.set_result([*said, handle.result().request.id])

    first.add_done_callback(use)
    faults.clear("fused.compute.first")
    *said, name = told.result(SURE)
    faults.clear("fused.compute.other")
    assert all("call submit, result, health, drain and close from another thread" in words for words in said)
    assert name == "first"
    assert other.result(SURE).data and pipeline.health()


@pytest.mark.proof
def test_a_request_whose_every_encode_hangs_fails_alone(
    pipeline: Pipeline, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = replace(pipeline.engine.fleet.config.failures, stall_s=1.0)
    faults.set("fused.encode.deadly", "stall")
    handle = pipeline.submit(ask("deadly"))
    for _ in range(failures.max_attempts):
        faults.await_arrival("fused.encode.deadly")
        faults.set("fused.encode.deadly", "stall")  # for the next attempt
        with monkeypatch.context() as hung:
            set_config(hung, pipeline, failures=failures)
            wait_until(lambda: not pipeline.replicas, "it was not found")
    with pytest.raises(StageError, match="fused failed 3 times"):
        handle.result(SURE)
    faults.clear("fused.encode.deadly")
    wait_until(lambda: pipeline.replicas, "nothing serves")


@pytest.mark.proof
def test_a_hung_load_is_ended_and_the_next_one_serves(
    pipeline: Pipeline, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = replace(pipeline.engine.fleet.config.cluster, start_timeout_s=25.0)
    set_config(monkeypatch, pipeline, cluster=cluster)
    faults.set("fused.load", "stall")
    os.kill(pipeline.replicas[0].pid, signal.SIGKILL)
    wait_until(lambda: "replica fused-0 did not start" in caplog.text, "its load was not ended")
    monkeypatch.undo()  # the next one may take its time
    wait_until(lambda: pipeline.replicas, "nothing serves")
    assert pipeline.generate(ask("after-load")).data
    assert "replica fused-0 did not start: waiting for fused-0" in caplog.text


@pytest.mark.proof
def test_closing_ends_whatever_hangs(
    cluster: None, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A loop that a callback holds up, and a replica that does not answer."""
    monkeypatch.setattr("disagg_ray.driver.host.STOP_S", 3.0)
    monkeypatch.setattr("disagg_ray.driver.loop.CLOSE_S", 1.0)
    go, held = threading.Event(), threading.Event()
    with Pipeline.from_config(T2V, "fused=true") as pipeline:
        faults.set("fused.compute.hung", "stall")
        hung = pipeline.submit(ask("hung"))
        faults.await_arrival("fused.compute.hung")

        def hold_up() -> None:
            held.set()
            go.wait(SURE)

        pipeline.loop.call_soon(hold_up)
        assert held.wait(SURE)
        pid = pipeline.replicas[0].pid
    assert hung.done()
    wait_until(lambda: not psutil.pid_exists(pid), "the replica lives on")
    assert "its event loop has hung" in caplog.text
    go.set()
    pipeline.loop.thread.join(SURE)
    assert not pipeline.loop.thread.is_alive()
