"""Jobs of an HTTP service while it, its proxy, the supervisor, replicas and the command itself are killed."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import helpers
import http_load
import pytest
from http_load import DEADLINE_S, Client, Results

from disagg_ray.http.keys import Key, add_key

pytestmark = pytest.mark.proof

LEAST_EACH, NUM_KEYS, BETWEEN = 15, 4, 8
"""BETWEEN: videos before a death."""
VICTIMS = (("ray::ServeReplica",), ("ray::ProxyActor",), ("ray::Supervisor",), ("ray::Fused", "ray::fused"))


@pytest.mark.timeout(900)
def test_no_accepted_job_is_lost_or_made_twice_whatever_is_killed(tmp_path: Path) -> None:
    file, port, results = tmp_path / "keys.json", helpers.free_port(), Results()
    clients = [Client(port, add_key(file, Key(f"key-{number}"))) for number in range(NUM_KEYS)]
    with (
        http_load.serving(tmp_path, port, f"service.api_keys={file}") as child,
        http_load.load(clients, results, LEAST_EACH),
    ):
        for number, victim in enumerate(VICTIMS, 1):
            helpers.wait_until(lambda n=number: len(results) >= n * BETWEEN, "no video comes", DEADLINE_S)
            http_load.kill_one(child.pid, victim)
    http_load.check(results)


@pytest.mark.timeout(900)
def test_a_command_that_is_killed_and_started_again_ends_each_job_once(tmp_path: Path) -> None:
    port, results = helpers.free_port(), Results()
    with ExitStack() as stack, http_load.load([Client(port) for _ in range(2)], results):
        with http_load.serving(tmp_path, port) as child:
            helpers.wait_until(lambda: len(results) >= 3, "no video comes", DEADLINE_S)
            child.send_signal(signal.SIGKILL)
        helpers.wait_until(lambda: helpers.is_free(port), "its proxy did not end with it", DEADLINE_S)
        stack.enter_context(http_load.serving(tmp_path, port))  # until the load has ended
    http_load.check(results)
