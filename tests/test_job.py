"""`ray job submit` against a real `ray start --head`, with token authentication on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import pytest
from helpers import head_node

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def job_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a head node; give the environment in which clients reach it."""
    with head_node(tmp_path_factory.mktemp("head") / "log") as head:
        yield head.environment


def submit(client: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "jobs/submit.sh", "conf/tiny_t2v.yaml", "a red circle", *arguments]
    return subprocess.run(command, env=client, capture_output=True, text=True, timeout=400, check=False)


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
