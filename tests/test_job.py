"""`ray job submit` against a real `ray start --head`, with token authentication on."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import pytest
from helpers import free_port, ray_folder

pytestmark = pytest.mark.proof

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def job_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a head node as a child process; give the environment in which clients reach it."""
    dashboard = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    options = ["--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}"]
    options += ["--num-cpus=8", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    options += [f"--dashboard-agent-listen-port={free_port()}"]  # the session's own Ray has the default one
    with ray_folder() as folder, (tmp_path_factory.mktemp("head") / "log").open("w") as log:
        command = [RAY, "start", *options, f"--temp-dir={folder}"]
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            client = environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
            wait_for_head(client)
            yield client
        finally:
            head.terminate()
            head.wait(30)


def wait_for_head(client: dict[str, str]) -> None:
    """The head answers before its agent takes jobs: wait until one is taken."""
    deadline = time.monotonic() + 120
    command = [RAY, "job", "submit", "--no-wait", "--", "true"]
    while (asked := subprocess.run(command, env=client, capture_output=True, text=True, check=False)).returncode:
        assert time.monotonic() < deadline, f"the head node did not come up: {asked.stdout}{asked.stderr}"
        time.sleep(1)


def submit(client: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "jobs/submit.sh", "conf/tiny_t2v.yaml", "a red circle", *arguments]
    return subprocess.run(command, env=client, capture_output=True, text=True, timeout=200, check=False)


def test_job_writes_the_video_and_its_log_says_so(job_environment: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    done = submit(job_environment, str(output), "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert iio.imread(output, plugin="FFMPEG").shape == (17, 256, 256, 3)
    for line in ("3 replicas ready", "request ", f"wrote {output}"):
        assert line in done.stdout


def test_failing_job_has_a_failing_status_and_says_why(job_environment: dict[str, str], tmp_path: Path) -> None:
    done = submit(job_environment, "out.mp4")
    assert done.returncode != 0
    assert "output: 'out.mp4' is relative" in done.stdout
    assert "absolute path" in done.stdout
