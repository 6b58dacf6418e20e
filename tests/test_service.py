"""A service shared by many clients, on a real local Ray: one serves every test here."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import psutil
import pytest
import ray
from PIL import Image

from disagg_ray import (
    Cancelled,
    Connection,
    LocalPipeline,
    Overloaded,
    Request,
    RequestError,
    cli,
    connect,
    load_config,
)
from disagg_ray.driver.names import find_replicas, services
from disagg_ray.environment import cache_folder
from disagg_ray.service import lifecycle
from disagg_ray.service.stub import SupervisorStub

pytestmark = pytest.mark.proof

T2V, I2V = "conf/tiny_t2v.yaml", "conf/tiny_i2v.yaml"
NAME = "tests"
SURE = 180.0
"""Seconds; what takes longer hangs."""
SMALL: dict[str, int] = {"num_frames": 9, "num_inference_steps": 4}
LONG = Request(prompt="a red circle", height=256, width=256, num_frames=17, num_inference_steps=100, id="long")
SETTINGS = ["service.client_timeout_s=10", "limits.max_queued=16", "stages.transformer.replicas=2"]


@pytest.fixture(scope="module")
def pipeline(cluster: None) -> Iterator[str]:
    """Give the name of the pipeline that stands; nothing of it may be left when it is down."""
    assert cli.main(["up", NAME, "--config", T2V, *SETTINGS]) == 0
    with connect(NAME) as connection:
        pids = [connection.snapshot().pid, *(replica.pid for replica in connection.replicas)]
    yield NAME
    assert cli.main(["down", NAME]) == 0
    assert (services(), find_replicas(NAME)) == ([], [])
    assert not (cache_folder() / "service" / NAME).exists()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "processes are left")


@pytest.fixture(scope="module")
def local() -> Callable[[Request], bytes]:
    """Give what the same stages make in one process."""
    alone = LocalPipeline.from_config(T2V)
    return cache(lambda request: alone.generate(request).data)


wait_until = partial(helpers.wait_until, timeout_s=SURE)
wait_until_empty = partial(helpers.wait_until_empty, timeout_s=SURE)


def pids(connection: Connection) -> dict[str, int]:
    return {replica.name: replica.pid for replica in connection.replicas}


def count(connection: Connection, stage: str) -> int:
    return sum(replica.stage == stage for replica in connection.replicas)


def small(seed: int, **more: object) -> Request:
    return Request(prompt="a red circle moves left", seed=seed, **SMALL, **more)  # type: ignore[arg-type]


def test_results_equal_those_of_one_process(pipeline: str, local: Callable[[Request], bytes]) -> None:
    requests = [small(seed) for seed in range(4)]
    with connect(pipeline) as connection:
        results = {result.request.seed: result.data for result in connection.generate_all(requests)}
        assert results == {request.seed: local(request) for request in requests}
        raw = connection.generate(small(1, format="npy")).frames
        assert np.array_equal(raw, LocalPipeline.from_config(T2V).generate(small(1, format="npy")).frames)
        wait_until_empty(connection)


def test_a_dead_supervisor_comes_back_to_its_replicas_and_loses_no_request(
    pipeline: str, local: Callable[[Request], bytes]
) -> None:
    with connect(pipeline) as connection:
        before = connection.snapshot()
        handles = [connection.submit(small(seed)) for seed in range(6)]
        os.kill(before.pid, signal.SIGKILL)
        assert [handle.result(SURE).data for handle in handles] == [local(small(seed)) for seed in range(6)]
        after = connection.snapshot()
        assert after.pid != before.pid
        assert {replica.pid for replica in after.replicas} == {replica.pid for replica in before.replicas}
        wait_until_empty(connection)


DRIVER = """
import os, signal, sys
from disagg_ray import Request, connect

def die(event):
    if (event.request_id, event.stage, event.state) == ("short", "transformer", "done"):
        os.kill(os.getpid(), signal.SIGKILL)

connection = connect(sys.argv[1], address=sys.argv[2], run_id="child", on_event=die)
for request_id, steps in (("short", 4), ("long", 100)):
    size = {"height": 64, "width": 64} if request_id == "short" else {"height": 256, "width": 256}
    connection.submit(Request(prompt="a cat", seed=1, num_frames=9, num_inference_steps=steps, id=request_id, **size))
connection.submit(Request(prompt="a cat", seed=2, id="last")).result()
"""


def test_a_dead_drivers_requests_are_cancelled_and_its_latents_are_kept(pipeline: str, cluster: None) -> None:
    address = ray.get_runtime_context().gcs_address
    child = subprocess.run([sys.executable, "-c", DRIVER, pipeline, address], check=False, timeout=SURE)
    assert child.returncode == -signal.SIGKILL
    with connect(pipeline) as connection:
        wait_until(lambda: "child" not in connection.snapshot().clients, "the dead driver is still known")
        wait_until_empty(connection)
    with connect(pipeline, run_id="child") as again:
        result = again.generate(Request(prompt="a cat", seed=1, height=64, width=64, **SMALL, id="short"))
    assert [timing.stage for timing in result.stages] == ["decoder"]


def test_a_driver_that_reconnects_gets_what_was_computed_meanwhile(pipeline: str) -> None:
    first, second = (Connection(pipeline, run_id="twice") for _ in range(2))
    first.submit(request := small(5, id="same")).result()
    assert second.generate(request).seconds == first.generate(request).seconds, "it was computed again"
    first.close()
    second.close()


def test_a_held_result_is_kept_for_others_of_its_run_id_until_it_is_acknowledged(pipeline: str) -> None:
    request = Request(prompt="a cat", seed=4, num_frames=5, num_inference_steps=2, id="held")
    with Connection(pipeline, run_id="held") as first, Connection(pipeline, run_id="held") as second:
        made = first.submit(request, hold=True).result()
        first.generate(replace(request, id="other"))
        wait_until(lambda: not first.unacknowledged, "the service does not know that the other is finished")
        assert second.submit(request, hold=True).result().seconds == made.seconds, "it was computed again"
        second.acknowledge("held")
        wait_until(lambda: not second.unacknowledged, "the service does not know that it is stored")
        assert first.generate(request).seconds != made.seconds, "it is kept longer"


def test_progress_cancel_and_overload_hold_through_a_connection(pipeline: str) -> None:
    with connect(pipeline) as connection:
        handles = [connection.submit(replace(LONG, id=str(number))) for number in range(16)]
        with pytest.raises(Overloaded, match=r"limits\.max_queued: this client has 16 unfinished requests"):
            connection.submit(LONG, wait=False)
        wait_until(lambda: any(h.progress and h.progress.step for h in handles), "no step was told")
        assert all(handle.cancel() for handle in handles)
        with pytest.raises(Cancelled):
            handles[0].result(SURE)
        with pytest.raises(RequestError, match=r"^invalid prompt='': must say"):
            connection.submit(Request(prompt=""))
        wait_until_empty(connection)


def test_what_a_client_waits_to_submit_when_its_heartbeat_stops_is_not_computed(
    pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = SupervisorStub.ask

    async def ask_without_heartbeat(self: SupervisorStub, method: str, *args: Any, **options: Any) -> Any:
        await (asyncio.Event().wait() if method == "listen" else asyncio.sleep(0))
        return await ask(self, method, *args, **options)

    with connect(pipeline) as connection:
        handles = [connection.submit(replace(LONG, id=str(number))) for number in range(16)]
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(connection.submit, replace(LONG, id="17"))
            monkeypatch.setattr(SupervisorStub, "ask", ask_without_heartbeat)
            with pytest.raises(Cancelled, match="its heartbeat stopped"):
                waiting.result(SURE)
        for handle in handles:
            with pytest.raises(Cancelled):
                handle.result(SURE)
        wait_until_empty(connection)


def test_what_is_given_up_while_it_waits_to_be_submitted_is_not_computed(pipeline: str) -> None:
    with connect(pipeline) as connection, ThreadPoolExecutor(1) as thread:
        handles = [connection.submit(replace(LONG, id=str(number))) for number in range(16)]
        waiting = thread.submit(connection.submit, replace(LONG, id="17"))
        wait_until(lambda: len(connection.in_flight) == 17, "it was not submitted")
        (last,) = [handle for handle in connection.in_flight if handle.request.id == "17"]
        last.cancel()
        with pytest.raises(Cancelled):
            waiting.result(SURE)
        wait_until(lambda: not connection.unacknowledged, "the service does not know that it is cancelled")
        assert all(handle.cancel() for handle in handles)
        wait_until_empty(connection)
        assert connection.snapshot().clients[connection.id] == 0


def test_a_late_modest_driver_is_not_starved_by_an_early_greedy_one(pipeline: str) -> None:
    order: list[str] = []
    with connect(pipeline) as greedy, connect(pipeline) as modest:
        with helpers.stopped(*(replica.pid for replica in greedy.replicas)):  # until all have been submitted
            handles = [greedy.submit(small(seed)) for seed in range(16)]
            handles += [modest.submit(small(seed)) for seed in range(4)]
            for number, handle in enumerate(handles):
                handle.add_done_callback(lambda _, who="greedy" if number < 16 else "modest": order.append(who))
        for handle in handles:
            handle.result(SURE)
    assert "modest" not in order[-3:]


def test_replicas_are_added_and_retired_while_requests_run(pipeline: str, local: Callable[[Request], bytes]) -> None:
    with connect(pipeline) as connection:
        handles = [connection.submit(small(seed)) for seed in range(4)]
        assert cli.main(["scale", pipeline, "transformer=1"]) == 0
        assert [handle.result(SURE).data for handle in handles] == [local(small(seed)) for seed in range(4)]
        wait_until(lambda: count(connection, "transformer") == 1, "no replica retired")
        assert cli.main(["scale", pipeline, "transformer=2"]) == 0
        wait_until(lambda: count(connection, "transformer") == 2, "no replica was added")
        assert connection.num_restarts == {"encoder": 0, "transformer": 0, "decoder": 0}


def test_a_replica_that_retires_is_listed_until_it_is_done(pipeline: str) -> None:
    with connect(pipeline) as connection:
        handles = [connection.submit(replace(LONG, id=f"last-{number}")) for number in range(2)]
        wait_until(lambda: all(h.progress and h.progress.step for h in handles), "not both compute")
        assert cli.main(["scale", pipeline, "transformer=1"]) == 0
        assert count(connection, "transformer") == 2
        assert cli.main(["ls"]) == 0
        assert all(handle.cancel() for handle in handles)
        wait_until(lambda: count(connection, "transformer") == 1, "no replica retired")
        assert cli.main(["scale", pipeline, "transformer=2"]) == 0
        wait_until(lambda: count(connection, "transformer") == 2, "no replica was added")


def test_a_new_configuration_replaces_replicas_without_losing_requests(
    pipeline: str, local: Callable[[Request], bytes]
) -> None:
    with connect(pipeline) as connection:
        before = {replica.name: replica.pid for replica in connection.replicas}
        handles = [connection.submit(small(seed)) for seed in range(4)]
        assert cli.main(["up", pipeline, "--config", T2V, *SETTINGS, "stages.encoder.cache_bytes=1000000"]) == 0
        assert [handle.result(SURE).data for handle in handles] == [local(small(seed)) for seed in range(4)]
        old = before["encoder-0"]
        wait_until(lambda: pids(connection).get("encoder-0", old) != old, "the encoder is not replaced")
        assert connection.generate(small(9)).data == local(small(9))
        after = pids(connection)
    assert {name for name in before if after[name] != before[name]} == {"encoder-0"}


def test_requests_survive_deaths_of_supervisor_and_replicas_together(
    pipeline: str, local: Callable[[Request], bytes]
) -> None:
    connections = [Connection(pipeline) for _ in range(3)]
    handles = [connection.submit(small(seed)) for seed in range(6) for connection in connections]
    snapshot = connections[0].snapshot()
    for victim in (snapshot.pid, next(r.pid for r in snapshot.replicas if r.stage == "decoder")):
        os.kill(victim, signal.SIGKILL)
        handles[0].result(SURE)
    assert [handle.result(SURE).data for handle in handles] == [
        local(small(seed)) for seed in range(6) for _ in range(3)
    ]
    wait_until_empty(connections[0])
    for connection in connections:
        connection.close()


def test_the_command_generates_lists_and_refuses(
    pipeline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--connect", pipeline, "--prompt", "a cat", "--num-frames", "9", "--num-inference-steps", "2"]
    assert cli.main(["generate", *arguments, "--output", str(tmp_path / "cat.mp4")]) == 0
    capsys.readouterr()
    assert cli.main(["ls", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["state"], shown["model"]) == (NAME, "ready", "builtin:tiny-wan-t2v")
    assert [(stage["stage"], stage["ready"]) for stage in shown["stages"]] == [
        ("encoder", 1), ("transformer", 2), ("decoder", 1),
    ]  # fmt: skip


REFUSED = [
    (["down", "nothing"], "no service named 'nothing' in this cluster; running: tests"),
    (
        ["generate", "--connect", "test", "--prompt", "x", "--output", "x.mp4"],
        "no service named 'test' in this",
    ),
    (["up", "Tests!", "--config", T2V], "invalid NAME='Tests!': must be 1 to 40"),
    (["scale", NAME, "transformer=0"], "'transformer=0': must be a stage and at least 1"),
    (["scale", NAME, "denoiser=2"], "denoiser: no such stage; there are encoder, transformer, decoder"),
    (["up", NAME, "--config", "conf/tiny_i2v.yaml"], "model: it cannot change while the service runs"),
    (["up", NAME, "--config", T2V, "--only", "encoder"], "'tests' runs already"),
    (["generate", "--connect", NAME, "--local", "--prompt", "x", "--output", "x.mp4"], "--local has no effect"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(
    pipeline: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_stages_that_are_started_at_once_make_one_pipeline(cluster: None) -> None:
    config, start = load_config(T2V), partial(lifecycle.up_stage, "at-once", here=False)
    try:
        with ThreadPoolExecutor(len(config.stages)) as threads:
            list(threads.map(lambda stage: start(stage, config), config.stages))
        with connect("at-once") as connection:
            assert connection.generate(small(1)).data
    finally:
        lifecycle.down("at-once", 0.0)


def test_stages_that_are_started_one_by_one_make_a_pipeline(cluster: None, image: Callable[..., Image.Image]) -> None:
    blocks = "text_encoder,image_encoder,vae_encoder,denoise"
    arguments = ["--config", I2V, "stages.encoder=null", f"stages.transformer.blocks=[{blocks}]"]
    assert cli.main(["up", "parts", *arguments, "--only", "decoder"]) == 0
    assert cli.main(["up", "parts", *arguments, "--only", "decoder"]) == 2
    assert "parts" not in services()
    assert cli.main(["up", "parts", *arguments, "--only", "transformer", "--here"]) == 0
    with connect("parts") as connection:
        request = small(1, image=image(90, 60))
        assert connection.generate(request).data == LocalPipeline.from_config(I2V).generate(request).data
        waiting = connection.submit(replace(LONG, image=image(128, 128)))
        assert cli.main(["down", "parts"]) == 0
        with pytest.raises(Cancelled):
            waiting.result(SURE)
    assert find_replicas("parts") == []
