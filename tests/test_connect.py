"""What a user does with a service: batches, signals, the doctor, metrics. One serves every test here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
import ray

from disagg_ray import Connection, Request, StartError, cli, connect
from disagg_ray.batch.manifest import read_manifest
from disagg_ray.batch.records import Record
from disagg_ray.driver.handle import Handle
from disagg_ray.errors import Cancelled, ReplicaLost
from disagg_ray.progress.events import Event
from disagg_ray.replica import software
from disagg_ray.service import lifecycle, stub

pytestmark = pytest.mark.proof

T2V = "conf/tiny_t2v.yaml"
NAME = "used"
SURE = 180.0
"""Seconds; what takes longer hangs."""
SETTINGS = ["failures.answer_s=5", "failures.shutdown_grace_s=1"]


@pytest.fixture(scope="module")
def pipeline(cluster: None) -> Iterator[str]:
    assert cli.main(["up", NAME, "--config", T2V, *SETTINGS]) == 0
    yield NAME
    assert cli.main(["down", NAME]) == 0


def write_requests(folder: Path, number: int, **more: object) -> Path:
    path = folder / "requests.jsonl"
    small = {"prompt": "a red circle", "num_frames": 9, "num_inference_steps": 2, **more}
    path.write_text("".join(json.dumps(small | {"id": f"clip-{n}"}) + "\n" for n in range(number)))
    return path


def generate(name: str, requests: Path, *more: str) -> list[str]:
    return [
        "generate", "--connect", name, "--requests", str(requests), "--output-dir", str(requests.parent / "out"), *more
    ]  # fmt: skip


def records(out: Path) -> dict[str, Record]:
    return {record.id: record for record in read_manifest(out)}


wait_until = partial(helpers.wait_until, timeout_s=SURE)


def test_a_batch_is_that_of_a_pipeline_of_ones_own_and_its_second_run_makes_nothing(
    pipeline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_back = SimpleNamespace(time=lambda: 0.0, monotonic=time.monotonic)  # which loses no request for the trace
    monkeypatch.setattr("disagg_ray.batch.run.time", set_back)
    requests, out, own = write_requests(tmp_path, 4), tmp_path / "out", tmp_path / "own"
    assert cli.main(generate(pipeline, requests, "--trace", str(tmp_path / "trace.json"))) == 0
    arguments = ["--config", T2V, "--requests", str(requests), "--output-dir", str(own), "fused=true"]
    assert cli.main(["generate", *arguments]) == 0
    for name, record in records(out).items():
        assert (record.sha256, record.content, record.setup) == (
            records(own)[name].sha256, records(own)[name].content, records(own)[name].setup,
        )  # fmt: skip
        assert [timing.stage for timing in record.stages] == ["encoder", "transformer", "decoder"]
    names = {span.get("name") for span in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert any("clip-3" in str(name) for name in names)
    capsys.readouterr()
    assert cli.main(generate(pipeline, requests, "--verify")) == 0
    assert "0 done, 4 done before" in capsys.readouterr().out
    assert cli.main(["report", str(out)]) == 0


def test_sigterm_ends_a_batch_and_the_next_run_resumes(
    pipeline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, out = write_requests(tmp_path, 24, num_frames=17), tmp_path / "out"
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "disagg_ray.cli", *generate(pipeline, requests)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        shown = []
        for line in child.stderr:
            shown.append(line)
            if " of 24 videos done" in line:
                break
        child.send_signal(signal.SIGTERM)
        shown += list(child.stderr)
        assert child.wait(SURE) == 143, shown
    assert any("stopping: interrupted; running requests get 1 s" in line for line in shown)
    made = len(records(out))
    assert 1 <= made < 24
    assert cli.main(generate(pipeline, requests)) == 0
    assert f"{24 - made} done, {made} done before, 0 failed" in capsys.readouterr().out
    assert {path.stem for path in out.glob("*.mp4")} == set(records(out))


def test_what_was_denoised_when_a_driver_stopped_is_only_decoded_by_the_next(pipeline: str) -> None:
    denoised = threading.Event()

    def watch(event: Event) -> None:
        if (event.stage, event.state) == ("transformer", "done"):
            denoised.set()

    request = Request(prompt="a cat", seed=1, height=128, width=128, num_frames=17, num_inference_steps=2, id="cut")
    with connect(pipeline, run_id="stopped", on_event=watch) as first:
        (decoder,) = (replica.pid for replica in first.replicas if replica.stage == "decoder")
        with helpers.stopped(decoder):  # or it might be done by then
            handle = first.submit(request)
            assert denoised.wait(SURE)
            first.drain(0)
        assert handle.done()
    with connect(pipeline, run_id="stopped") as second:
        assert [timing.stage for timing in second.generate(request).stages] == ["decoder"]


def test_a_batch_waits_for_another_request_of_its_id_that_an_earlier_run_left(
    pipeline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, out = write_requests(tmp_path, 2), tmp_path / "out"
    with connect(pipeline, run_id=str(out)) as earlier:
        other = Request("a blue square", id="clip-0", height=128, width=128, num_frames=17, num_inference_steps=100)
        left = earlier.submit(other)
        assert cli.main(generate(pipeline, requests)) == 0
        assert left.result(SURE).request.prompt == "a blue square"
    assert "id: 'clip-0' is in flight" in capsys.readouterr().err
    prompts = {name: record.request and record.request.prompt for name, record in records(out).items()}
    assert prompts == {"clip-0": "a red circle", "clip-1": "a red circle"}


def test_taking_a_pipeline_down_ends_a_batch_and_fails_no_request(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests, out = write_requests(tmp_path, 100), tmp_path / "out"
    assert cli.main(["up", "brief", "--config", T2V, "fused=true"]) == 0

    def end() -> None:
        wait_until((out / "clip-0.mp4").exists, "nothing was made")
        lifecycle.down("brief", 0.0)

    thread = threading.Thread(target=end)
    thread.start()
    status = cli.main(generate("brief", requests))
    thread.join()
    shown = capsys.readouterr().out
    assert status == 1
    assert "stopped: " in shown
    assert "run it again to resume" in shown
    assert {record.status for record in records(out).values()} == {"done"}


def test_a_client_is_told_that_its_service_was_taken_down_and_another_put_up(cluster: None) -> None:
    up, down = ["up", "renewed", "--config", T2V, "fused=true"], ["down", "renewed"]
    assert cli.main(up) == 0
    with connect("renewed") as client:
        assert (cli.main(down), cli.main(up)) == (0, 0)
        with pytest.raises(Cancelled, match="taken down, and put up again"):
            client.generate(Request("a cat", num_frames=5, num_inference_steps=2))
    assert cli.main(down) == 0


def test_a_service_that_finds_no_model_when_it_comes_back_serves_again_once_it_does(
    cluster: None, tmp_path: Path
) -> None:
    model, away = tmp_path / "model", tmp_path / "away"
    shutil.copytree("disagg_ray/builtin/tiny-wan-t2v", model)
    assert cli.main(["up", "moved", "--config", T2V, "fused=true", f"model.path={model}"]) == 0
    with connect("moved") as client:
        pids = client.snapshot().pid, client.replicas[0].pid
        model.rename(away)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: state("moved").startswith("failed: model.path: "), "no failure is told")
        away.rename(model)
        wait_until(lambda: state("moved") == "ready", "it does not come back")
        assert client.generate(Request("a cat", num_frames=5, num_inference_steps=2)).data
    assert cli.main(["down", "moved"]) == 0


def state(name: str) -> str:
    try:
        return stub.take_snapshot(name).state
    except StartError:
        return "its supervisor does not answer"


def test_a_supervisor_that_hangs_is_named_by_a_deadline(pipeline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(pipeline) as client:
        pid = client.snapshot().pid
        monkeypatch.setattr(stub, "RETURN_S", 1.0)
        with helpers.stopped(pid), pytest.raises(ReplicaLost, match="its supervisor does not answer within 1 s"):
            client.snapshot()
        monkeypatch.undo()
        assert client.snapshot().pid == pid


def test_a_request_fails_when_its_supervisor_hangs_and_is_cancelled_when_that_resumes(
    pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub, "PROBE_S", 1.0)
    with connect(pipeline) as client:
        pid = client.snapshot().pid
        handle = client.submit(Request("a cat", height=128, width=128, num_frames=17, num_inference_steps=100))
        wait_until(lambda: handle.progress is not None and handle.progress.step > 0, "it does not run")
        monkeypatch.setattr(stub, "RETURN_S", 1.0)
        with helpers.stopped(pid), pytest.raises(ReplicaLost, match="its supervisor does not answer within 1 s"):
            handle.result(SURE)
        monkeypatch.undo()
        wait_until(lambda: client.snapshot().clients[client.id] == 0, "it is not cancelled")
        assert client.generate(Request("a cat", num_frames=9, num_inference_steps=2)).data


def test_what_would_wait_for_the_connections_own_thread_raises_there(pipeline: str) -> None:
    told: Future[int] = Future()
    with connect(pipeline) as client:

        def use(handle: Handle) -> None:
            for call in (lambda: client.submit(Request(prompt="a cat")), client.health, client.close):
                with pytest.raises(RuntimeError, match="from another thread"):
                    call()
            told.set_result(handle.result().request.seed)

        long = Request(prompt="a cat", seed=3, height=64, width=64, num_frames=17, num_inference_steps=30)
        client.submit(long).add_done_callback(use)
        assert told.result(SURE) == 3


def test_a_connection_that_fails_to_listen_listens_again(
    pipeline: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask, failures = stub.SupervisorStub.ask, [RuntimeError("unforeseen")]

    async def fail_once(self: stub.SupervisorStub, method: str, *args: Any, **options: Any) -> Any:
        if method == "listen" and failures:
            raise failures.pop()
        return await ask(self, method, *args, **options)

    with connect(pipeline, on_event=(heard := []).append) as client:
        monkeypatch.setattr(stub.SupervisorStub, "ask", fail_once)
        for seed in range(2):  # an answer to `listen` is on its way: the failure comes with the next one
            client.generate(Request(prompt="a cat", seed=seed, num_frames=5, num_inference_steps=2))
        wait_until(lambda: not client.unacknowledged, "the service does not know that they are finished")
        wait_until(lambda: any(event.state == "done" and not event.stage for event in heard), "nothing was heard")
        wait_until(lambda: "background task listen failed; it is started again" in caplog.text, "no failure was told")


def test_a_client_of_another_version_is_refused(pipeline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(software.software(), digest="another", folder="/elsewhere")
    monkeypatch.setattr(software, "software", lambda: here)
    with pytest.raises(StartError, match=rf"service {pipeline} runs other code than this client: .* in /elsewhere; "):
        connect(pipeline)


def test_the_same_request_may_be_asked_for_again_and_again(pipeline: str) -> None:
    request = Request(prompt="a cat", seed=1, num_frames=5, num_inference_steps=2, id="again")
    with connect(pipeline) as client:
        assert len({client.generate(request).data for _ in range(12)}) == 1


REFUSED = [
    (["--connect", "us"], "no service named 'us' in this cluster; running: used"),
    (["--connect", NAME, "--config", T2V], "--config: give either a YAML file, or the NAME of a service as --connect"),
    (["--connect", NAME, "stages.transformer.replicas=2"], "stages.transformer.replicas=2 has no effect"),
    (["--connect", NAME, "b.png"], "override: 'b.png' is not KEY=VALUE"),
    (["--connect", NAME], "1 lines of"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_a_batch_that_cannot_be_is_refused_before_any_work(
    pipeline: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = write_requests(tmp_path, 1, height=1024, width=1024)
    given = ["--requests", str(requests), "--output-dir", str(tmp_path / "out")]
    assert cli.main(["generate", *arguments, *given]) == 2
    shown = capsys.readouterr().err
    assert message in shown.splitlines()[-1]
    assert ("height x width=1048576: must be at most limits.max_pixels=65536" in shown) == (message == "1 lines of")


def diagnose(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the status of each of the doctor's checks."""
    capsys.readouterr()
    status = cli.main(["doctor", "--connect", NAME, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == status
    return {check["name"]: check["status"] for check in told["checks"]}


def test_the_doctor_asks_every_replica_and_a_silent_one_is_replaced(
    pipeline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["supervisor", "encoder", "transformer", "decoder", "decoder-0", "encoder-0", "transformer-0", "video"]
    found = diagnose(capsys)
    assert list(found) == names
    assert "fail" not in found.values()
    with Connection(pipeline) as client:
        (silent,) = (replica.pid for replica in client.replicas if replica.stage == "decoder")
        helpers.stop(silent)
        found = diagnose(capsys)
        assert (found["decoder-0"], found["video"]) == ("fail", "ok")
        assert client.num_restarts["decoder"] == 1
    assert diagnose(capsys)["decoder-0"] != "fail"
    assert cli.main(["doctor", "--connect", NAME, "--config", T2V]) == 2
    assert cli.main(["doctor", "--connect", "nobody"]) == 2


def test_metrics_are_those_of_the_supervisor(pipeline: str) -> None:
    with Connection(pipeline) as client:
        client.generate(Request(prompt="a cat", num_frames=9, num_inference_steps=2))
        node = next(node for node in ray.nodes() if node["NodeManagerAddress"] == client.snapshot().address)

    def scraped() -> str:
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return str(answer.read().decode())

    def is_counted() -> bool:
        lines = [line for line in scraped().splitlines() if line.startswith("ray_disagg_ray_requests_total{")]
        return any('outcome="done"' in line and float(line.split()[-1]) >= 1 for line in lines)

    wait_until(is_counted, "no request is counted")
    capacity = [line for line in scraped().splitlines() if line.startswith("ray_disagg_ray_pool_capacity_bytes{")]
    assert any('replica="driver"' in line and float(line.split()[-1]) > 0 for line in capacity)
