"""Sixty requests while everything is struck: see chaos.py, which runs in a process of its own with its own cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof


@pytest.mark.timeout(900)
def test_no_request_is_lost_or_denoised_twice_when_every_stage_and_a_node_are_struck(tmp_path: Path) -> None:
    script = Path(__file__).with_name("chaos.py")
    alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "60 videos" in done.stdout and "nothing lost, nothing twice" in done.stdout
