"""A gang over several nodes, in a cluster and a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_service_nodes import run

pytestmark = pytest.mark.proof


def test_a_gang_that_loses_a_node_ends_and_its_request_goes_on(tmp_path: Path) -> None:
    assert "the gang went on without either node" in run("gang_nodes.py", str(tmp_path))
