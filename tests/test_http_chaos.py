"""Jobs of an HTTP service while it, its proxy, the supervisor, replicas and the command itself are killed."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helpers
import http_load
import pytest
from http_load import DEADLINE_S, Client, Results

from disagg_ray.http.keys import Key, add_key

pytestmark = pytest.mark.proof

NUM_EACH, NUM_KEYS = 50, 4
VICTIMS = (("ray::ServeReplica",), ("ray::ProxyActor",), ("ray::Supervisor",), ("ray::Fused", "ray::fused"))
EVERY_S = 6.0


@contextmanager
def serving(folder: Path, port: int, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """Give `disagg-ray serve`, which answers; end it."""
    with (folder / "log").open("w") as log:
        command = http_load.command(port, f"service.folder={folder}/videos", *overrides)
        with subprocess.Popen(command, env=http_load.environment(), stdout=log, stderr=log) as child:
            try:
                helpers.wait_until(lambda: "page: " in (folder / "log").read_text(), "not up", DEADLINE_S)
                yield child
            finally:
                child.terminate()
                child.wait(120)


@pytest.mark.timeout(900)
def test_no_accepted_job_is_lost_or_made_twice_whatever_is_killed(tmp_path: Path) -> None:
    file, port, struck, results = tmp_path / "keys.json", helpers.free_port(), list[str](), Results()
    keys = [add_key(file, Key(f"key-{number}")) for number in range(NUM_KEYS)]
    with serving(tmp_path, port, f"service.api_keys={file}") as child:

        def strike(over: threading.Event) -> None:
            struck.extend(http_load.strike(child.pid, VICTIMS, EVERY_S, over))

        http_load.load([Client(port, key) for key in keys], NUM_EACH, results, strike)
    print(f"struck: {struck}")
    http_load.check(results, NUM_EACH * NUM_KEYS)
    assert len(struck) >= 4


@pytest.mark.timeout(900)
def test_a_command_that_is_killed_and_started_again_ends_each_job_once(tmp_path: Path) -> None:
    port, results, number = helpers.free_port(), Results(), 20

    def kill_and_start(over: threading.Event) -> None:
        for finished in (3, 20):
            with serving(tmp_path, port) as child:
                helpers.wait_until(lambda f=finished: len(results) >= f, "no video came", DEADLINE_S)
                child.send_signal(signal.SIGKILL)
            helpers.wait_until(lambda: helpers.is_free(port), "its proxy did not end with it", DEADLINE_S)
        with serving(tmp_path, port):
            assert over.wait(DEADLINE_S)

    http_load.load([Client(port) for _ in range(2)], number, results, kill_and_start)
    http_load.check(results, 2 * number)
