"""Services on several nodes: scripts with clusters of their own, in processes of their own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof


def run(name: str, *arguments: str) -> str:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    alone |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def test_stages_stand_on_the_nodes_and_shared_gpus_that_were_asked_for_and_leave_nothing() -> None:
    assert "nothing left" in run("places.py")


def test_a_cluster_that_grows_is_waited_for_visibly_and_grows_with_the_load(tmp_path: Path) -> None:
    shown = run("growing.py", str(tmp_path))
    assert "waiting for the replicas of grow" in shown
    assert "grew and shrank" in shown


def test_nodes_come_for_one_video_and_go_and_what_can_never_be_placed_is_said(tmp_path: Path) -> None:
    shown = run("growing_once.py", str(tmp_path))
    assert "made on nodes that came" in shown
    assert "idle nodes went" in shown
    assert "said what can never be" in shown
