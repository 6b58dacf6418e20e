"""Two hundred jobs of four keys while the HTTP service, its proxy, the supervisor and replicas are killed."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import psutil
import pytest

from disagg_ray import LocalPipeline, Request
from disagg_ray.http.keys import Key, add_key

pytestmark = pytest.mark.proof

T2V = "conf/tiny_t2v.yaml"
NUM_EACH, NUM_KEYS, NUM_SEEDS = 50, 4, 5
SETTINGS: dict[str, Any] = {"prompt": "a red circle", "num_frames": 5, "num_inference_steps": 4}
SIZE = {"height": 32, "width": 32}
VICTIMS = ("ray::ServeReplica", "ray::ProxyActor", "ray::Supervisor", "ray::Fused", "ray::fused")
EVERY_S = 6.0
DEADLINE_S = 500.0


class Client:
    """Asks again whatever is not answered: the service may be dead that moment."""

    def __init__(self, port: int, key: str) -> None:
        self._base, self._key, self._deadline = f"http://127.0.0.1:{port}", key, time.monotonic() + DEADLINE_S

    def ask(self, path: str, body: dict[str, Any] | None = None, idempotency_key: str = "") -> bytes:
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        headers |= {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        data = json.dumps(body).encode() if body is not None else None
        while True:
            try:
                with urllib.request.urlopen(urllib.request.Request(self._base + path, data, headers), timeout=10) as f:
                    return bytes(f.read())
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise
            except (OSError, http.client.HTTPException):  # HTTPException: an answer cut off in the middle
                pass
            assert time.monotonic() < self._deadline, path
            time.sleep(0.5)


def strike(root: psutil.Process, over: threading.Event, struck: list[str]) -> None:
    """Kill one process of those that serve, again and again."""
    rng = random.Random(0)
    while not over.wait(EVERY_S):
        name = VICTIMS[len(struck) % 4]
        names = {process: process.name() for process in root.children(recursive=True) if process.is_running()}
        wanted = VICTIMS[3:] if name == VICTIMS[3] else (name,)
        if found := [process for process, shown in names.items() if shown.startswith(wanted)]:
            rng.choice(found).send_signal(signal.SIGKILL)
            struck.append(name)


def run(client: Client, number: int, results: list[tuple[int, str, bytes]]) -> None:
    """Post one key's jobs, each twice, and wait for their videos."""
    made = []
    for seed in range(NUM_EACH):
        body = SETTINGS | {"seed": seed % NUM_SEEDS, "size": "32x32"}
        ids = {json.loads(client.ask("/v1/videos", body, f"{number}-{seed}"))["id"] for _ in range(2)}
        assert len(ids) == 1
        made.append(ids.pop())
    for seed, video_id in enumerate(made):
        status = ""
        while status not in ("completed", "failed"):
            status = json.loads(client.ask(f"/v1/videos/{video_id}"))["status"]
            time.sleep(0.05)
        content = client.ask(f"/v1/videos/{video_id}/content") if status == "completed" else b""
        results.append((seed, video_id, content))
    listed = json.loads(client.ask("/v1/videos?limit=100"))["data"]
    assert sorted(video["id"] for video in listed) == sorted(made)


@pytest.mark.timeout(900)
def test_no_accepted_job_is_lost_or_made_twice_whatever_is_killed(tmp_path: Path) -> None:
    local = LocalPipeline.from_config(T2V)
    expected = [local.generate(Request(**SETTINGS, **SIZE, seed=seed)).data for seed in range(NUM_SEEDS)]
    file, port = tmp_path / "keys.json", helpers.free_port()
    keys = [add_key(file, Key(f"key-{number}")) for number in range(NUM_KEYS)]
    command = [sys.executable, "-m", "disagg_ray.cli", "serve", "--config", T2V, "--port", str(port), "fused=true",
               f"service.folder={tmp_path}/videos", f"service.api_keys={file}"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as child,
    ):
        try:
            clients = [Client(port, key) for key in keys]
            helpers.wait_until(lambda: "page: " in (tmp_path / "log").read_text(), "not up", DEADLINE_S)
            clients[0].ask("/ready")
            over, struck, results = threading.Event(), list[str](), list[tuple[int, str, bytes]]()
            striker = threading.Thread(target=strike, args=(psutil.Process(child.pid), over, struck))
            striker.start()
            serve_all([lambda c=client, n=n: run(c, n, results) for n, client in enumerate(clients)])
            over.set()
            striker.join()
        finally:
            child.terminate()
            child.wait(120)
    print(f"struck: {struck}")
    assert len({video_id for _, video_id, _ in results}) == len(results) == NUM_EACH * NUM_KEYS
    assert all(content == expected[seed % NUM_SEEDS] for seed, _, content in results)
    assert len(struck) >= 4


def serve_all(runs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=each) for each in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
