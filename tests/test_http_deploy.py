"""`serve deploy` of a configuration file: two replicas over PostgreSQL, which are killed; what a shutdown leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import helpers
import http_load
import pytest
import yaml
from http_load import DEADLINE_S, SETTINGS, Client, Results
from postgres import Postgres

pytestmark = [pytest.mark.proof, pytest.mark.timeout(900)]

SERVE = str(Path(sys.executable).with_name("serve"))
NUM_CLIENTS, NUM_DEATHS, BETWEEN = 2, 2, 5
"""BETWEEN: videos before a death."""
REPLICA = ("ray::ServeReplica",)
STEPS = re.compile(r"^\S*disagg_ray_denoise_steps_total\{.*\} (\S+)$", re.MULTILINE)
DONE = re.compile(r'^\S*disagg_ray_requests_total\{.*outcome="done".*\} (\S+)$', re.MULTILINE)


@dataclass
class Deployed:
    """An HTTP service on a head node."""

    head: helpers.Head
    file: Path
    port: int

    def serve(self, *arguments: str) -> str:
        command = [SERVE, *arguments]
        return subprocess.run(
            command, env=self.head.environment, check=True, timeout=300, stdout=subprocess.PIPE, text=True
        ).stdout

    def num_running(self) -> int:
        """Return how many replicas run."""
        application = yaml.safe_load(self.serve("status"))["applications"]["disagg_ray"]
        return int(application["deployments"]["videos"]["replica_states"].get("RUNNING", 0))

    def deploy(self) -> Client:
        self.serve("deploy", str(self.file))
        client = Client(self.port)
        client.ask("/ready")
        return client


@pytest.fixture(scope="module")
def deployed(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder, port = tmp_path_factory.mktemp("deployed"), helpers.free_port()
    args = {"config": str(Path(http_load.T2V).absolute()), "name": "films", "overrides": ["fused=true"],
            "folder": f"{folder}/videos", "database": postgres.url}  # fmt: skip
    application = {"name": "disagg_ray", "route_prefix": "/", "import_path": "disagg_ray.http.app:app", "args": args,
                   "deployments": [{"name": "videos", "num_replicas": 2}]}  # fmt: skip
    options = {"host": helpers.HOST, "port": port}
    content = {"proxy_location": "HeadOnly", "http_options": options, "applications": [application]}
    (folder / "serve.yaml").write_text(yaml.safe_dump(content))
    with helpers.head_node(folder / "log") as head:
        yield Deployed(head, folder / "serve.yaml", port)


def test_jobs_outlive_a_shutdown_of_serve(deployed: Deployed) -> None:
    results = Results()
    client = deployed.deploy()
    (made,) = http_load.make_videos(client, "before", 1, results)
    late = json.loads(client.ask("/v1/videos", SETTINGS | {"num_inference_steps": 100}))["id"]
    deployed.serve("shutdown", "-y")
    client = deployed.deploy()
    assert client.ask(f"/v1/videos/{made}/content") == results[0][2]

    def is_completed() -> bool:
        return bool(json.loads(client.ask(f"/v1/videos/{late}"))["status"] == "completed")

    helpers.wait_until(is_completed, "the job that ran is lost", DEADLINE_S)
    for video_id in (made, late):
        client.delete(f"/v1/videos/{video_id}")
    http_load.check(results)
    helpers.wait_until(lambda: count(client, DONE) >= 2, "they are not counted", DEADLINE_S)  # Ray reports now and then


def test_two_replicas_killed_in_turn_end_each_job_once_and_nothing_is_computed_twice(deployed: Deployed) -> None:
    client, results = deployed.deploy(), Results()
    before = count(client, STEPS)

    def are_two() -> bool:
        return len(http_load.find(deployed.head.pid, REPLICA)) == 2 == deployed.num_running()

    with http_load.load([Client(deployed.port) for _ in range(NUM_CLIENTS)], results):
        for number in range(1, NUM_DEATHS + 1):
            helpers.wait_until(are_two, "no replica follows one that died", DEADLINE_S)
            helpers.wait_until(lambda n=number: len(results) >= n * BETWEEN, "no video comes", DEADLINE_S)
            http_load.kill_one(deployed.head.pid, REPLICA)
    http_load.check(results)
    steps = SETTINGS["num_inference_steps"]
    wanted = before + len(results) * steps
    helpers.wait_until(lambda: count(client, STEPS) >= wanted, "steps are not counted", DEADLINE_S)
    assert count(client, STEPS) == wanted


def count(client: Client, what: re.Pattern[str]) -> float:
    """Return what was reported so far."""
    return sum(map(float, what.findall(client.ask("/metrics").decode())))
