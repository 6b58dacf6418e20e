"""`serve deploy` of a configuration file: two replicas over PostgreSQL, which are killed; what a shutdown leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
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
NUM_CLIENTS, NUM_EACH, EVERY_S = 2, 30, 5.0
STEPS = re.compile(r"^\S*disagg_ray_denoise_steps_total\{.*\} (\S+)$", re.MULTILINE)


@dataclass
class Deployed:
    """An HTTP service on a head node."""

    head: helpers.Head
    file: Path
    port: int

    def serve(self, *arguments: str) -> None:
        subprocess.run([SERVE, *arguments], env=self.head.environment, check=True, timeout=300)

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
    http_load.check(results, 1)


def test_two_replicas_that_are_killed_in_turn_compute_each_job_once(deployed: Deployed) -> None:
    client, struck, results = deployed.deploy(), list[str](), Results()
    before = count_steps(client)

    def strike(over: threading.Event) -> None:
        struck.extend(http_load.strike(deployed.head.pid, [("ray::ServeReplica",)], EVERY_S, over))

    http_load.load([Client(deployed.port) for _ in range(NUM_CLIENTS)], NUM_EACH, results, strike)
    print(f"struck: {struck}")
    http_load.check(results, NUM_CLIENTS * NUM_EACH)
    assert len(struck) >= 2
    wanted = before + NUM_CLIENTS * NUM_EACH * SETTINGS["num_inference_steps"]
    helpers.wait_until(lambda: count_steps(client) >= wanted, "steps are not counted", DEADLINE_S)
    assert count_steps(client) == wanted


def count_steps(client: Client) -> float:
    """Return the denoising steps that were computed."""
    return sum(map(float, STEPS.findall(client.ask("/metrics").decode())))
