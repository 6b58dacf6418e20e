"""Clients that ask an HTTP service for videos while it is struck, and what they must find."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import helpers
import psutil

from disagg_ray import LocalPipeline, Request

T2V = "conf/tiny_t2v.yaml"
NUM_SEEDS = 5
BATCH = 5
"""A client's jobs at once; the next come when these have ended."""
SETTINGS: dict[str, Any] = {"prompt": "a red circle", "num_frames": 5, "num_inference_steps": 4}
SIZE = {"height": 32, "width": 32}
DEADLINE_S = 500.0

Results = list[tuple[int, str, bytes]]
"""Number, id and content of each finished job."""


class Client:
    """Asks again whatever is not answered: the service may be dead that moment."""

    def __init__(self, port: int, key: str = "") -> None:
        self._base, self._deadline = f"http://127.0.0.1:{port}", time.monotonic() + DEADLINE_S
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def delete(self, path: str) -> None:
        asked = urllib.request.Request(self._base + path, headers=self._headers, method="DELETE")
        urllib.request.urlopen(asked, timeout=60).close()

    def list(self) -> list[dict[str, Any]]:
        videos, page = list[dict[str, Any]](), {"has_more": True, "last_id": None}
        while page["has_more"]:
            after = f"&after={page['last_id']}" if page["last_id"] else ""
            page = json.loads(self.ask(f"/v1/videos?limit=100{after}"))
            videos += page["data"]
        return videos

    def ask(self, path: str, body: dict[str, Any] | None = None, idempotency_key: str = "") -> bytes:
        headers = self._headers | ({"Idempotency-Key": idempotency_key} if idempotency_key else {})
        data = json.dumps(body).encode() if body is not None else None
        while True:
            try:
                with urllib.request.urlopen(urllib.request.Request(self._base + path, data, headers), timeout=10) as f:
                    return bytes(f.read())
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (404, 429):  # 404: Serve knows no application yet
                    raise
            except (OSError, http.client.HTTPException):  # HTTPException: an answer cut off in the middle
                pass
            assert time.monotonic() < self._deadline, path
            time.sleep(0.5)


def make_videos(client: Client, name: str, number: int, results: Results) -> list[str]:
    """Post jobs, each twice, and wait for their videos; return their ids."""
    made = []
    for seed in range(number):
        body = SETTINGS | {"seed": seed % NUM_SEEDS, "size": "32x32"}
        ids = {json.loads(client.ask("/v1/videos", body, f"{name}-{seed}"))["id"] for _ in range(2)}
        assert len(ids) == 1
        made.append(ids.pop())
    for seed, video_id in enumerate(made):
        status = ""
        while status not in ("completed", "failed"):
            status = json.loads(client.ask(f"/v1/videos/{video_id}"))["status"]
            time.sleep(0.05)
        content = client.ask(f"/v1/videos/{video_id}/content") if status == "completed" else b""
        results.append((seed, video_id, content))
    return made


@contextmanager
def load(clients: Sequence[Client], results: Results, least: int = 0) -> Iterator[None]:
    """Have each client make videos until the block, which strikes the service, ends; each makes at least `least`.

    At the end each client must find the jobs that were made, and no others.
    """
    over = threading.Event()

    def make(client: Client, index: int) -> set[str]:
        made = set[str]()
        while len(made) < least or not over.is_set():
            made |= set(make_videos(client, f"{index}-{len(made)}", BATCH, results))
        return made

    with ThreadPoolExecutor(len(clients)) as pool:
        runs = [pool.submit(make, client, index) for index, client in enumerate(clients)]
        try:
            yield
        finally:
            over.set()
            made = set[str]().union(*(run.result() for run in runs))
    assert {video["id"] for each in clients for video in each.list()} == made == {each for _, each, _ in results}


def check(results: Results) -> None:
    """Check that each job ended once, with the video that one process makes."""
    local = LocalPipeline.from_config(T2V)
    expected = [local.generate(Request(**SETTINGS, **SIZE, seed=seed)).data for seed in range(NUM_SEEDS)]
    assert len({video_id for _, video_id, _ in results}) == len(results)
    assert all(content == expected[seed % NUM_SEEDS] for seed, _, content in results)


def kill_one(root: int, names: tuple[str, ...]) -> None:
    """Kill one of the processes below a root that have one of these names, as soon as there is one."""

    def kill() -> bool:
        with suppress(psutil.NoSuchProcess):
            for victim in find(root, names)[:1]:
                victim.kill()
                return True
        return False

    helpers.wait_until(kill, f"no {names[0]} is there to be killed", DEADLINE_S)


def find(root: int, names: tuple[str, ...]) -> list[psutil.Process]:
    """Return the processes below a root whose names begin with one of these."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(names) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@contextmanager
def serving(folder: Path, port: int, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """Give `disagg-ray serve`, which answers; end it."""
    with (folder / "log").open("w") as log:
        asked = command(port, f"service.folder={folder}/videos", *overrides)
        with subprocess.Popen(asked, env=environment(), stdout=log, stderr=log) as child:
            try:
                helpers.wait_until(lambda: "page: " in (folder / "log").read_text(), "not up", DEADLINE_S)
                yield child
            finally:
                child.terminate()
                child.wait(120)


def command(port: int, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "disagg_ray.cli",
        "serve",
        "--config",
        T2V,
        "--port",
        str(port),
        "fused=true",
        *overrides,
    ]


def environment() -> dict[str, str]:
    """Return ours without Ray's: the session's cluster is none of theirs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
