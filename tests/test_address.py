"""Addresses of Ray clusters: real clusters, and real sockets that are none."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import HOST, free_port, ray_folder, refusal, wait_until

from disagg_ray.driver import address as address_module
from disagg_ray.driver.address import check_form, find_cluster
from disagg_ray.errors import ConfigError, StartError

RAY = Path(sys.executable).with_name("ray")
OTHER = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
COMMAND = [sys.executable, "-m", "disagg_ray.cli"]


@contextmanager
def dashboard() -> Iterator[str]:
    """Give the address of an HTTP server."""
    with ThreadingHTTPServer((HOST, 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{HOST}:{server.server_port}"
        server.shutdown()


def test_a_port_that_is_not_a_clusters_is_named_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(address_module, "ANSWER_S", 1.0)
    with dashboard() as http, pytest.raises(StartError, match=r"is not a Ray cluster's GCS \(8265 is the dashboard"):
        find_cluster(http)
    with socket.create_server((HOST, 0)) as silent:
        address = f"{HOST}:{silent.getsockname()[1]}"
        with pytest.raises(StartError, match=rf"'{address}' cannot be joined: nothing answers at {address} within 1 s"):
            find_cluster(address)
    assert f"nothing answers at {address}: Connection refused" in refusal(address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://head:8265", r"this is the dashboard's address, for `ray job submit`: write HOST:PORT"),
        ("ray://head:10001", "Ray's client protocol is not supported"),
        ("local", "no cluster that runs has this address"),
        ("head", "write HOST:PORT of the head's GCS, as"),
        ("head:99999", "write HOST:PORT"),
        ("\x1b[2Jhead", r"'\\x1b\[2Jhead'"),
    ],
)
def test_what_is_no_address_is_refused_in_a_line_that_says_what_to_write(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS: invalid address .*{message}") as refused:
        check_form("RAY_ADDRESS", address)
    assert "\n" not in str(refused.value)
    for known in ("10.0.0.1:6379", "head:6379", "[::1]:6379"):
        check_form("RAY_ADDRESS", known)


@pytest.mark.slow
def test_commands_end_with_a_line_where_the_address_is_a_dashboards() -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with dashboard() as http:
        for address, status in ((http, 1), (f"http://{http}", 2)):
            done = subprocess.run(
                [*COMMAND, "ls"], check=False, env=alone | {"RAY_ADDRESS": address}, capture_output=True, text=True
            )
            assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
            assert done.stderr.startswith("disagg-ray: ")
            assert "RAY_ADDRESS: " in done.stderr


JOIN = [sys.executable, "-c", "import sys; from disagg_ray.driver.cluster import join; join(*sys.argv[1:] or [None])"]


@pytest.mark.proof
def test_a_plain_head_with_a_token_is_found_and_a_token_that_is_missing_is_named(tmp_path: Path) -> None:
    token, address = tmp_path / ".ray" / "auth_token", f"{HOST}:{free_port()}"
    token.parent.mkdir()
    token.write_text(secrets.token_hex(32))
    home = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(tmp_path)}
    with ray_folder() as folder:
        options = ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}", "--num-cpus=1"]
        options += [f"--dashboard-agent-listen-port={free_port()}"]  # the session's own Ray has the default one
        command = [RAY, "start", "--head", f"--port={address.rpartition(':')[2]}", *options, "--block"]
        with subprocess.Popen(command, env=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as head:
            try:
                wait_until(lambda: "token" in refusal(address), "the head did not come up", timeout_s=240)
                joined = partial(subprocess.run, check=False, stderr=subprocess.PIPE, text=True, timeout=240)
                wait_until(
                    lambda: joined([*JOIN, address], env=home).returncode == 0, "its own node is not joined", 240
                )  # a busy machine's node is there long after its head answers
                for without in ({"HOME": str(folder)}, OTHER):
                    told = joined([*JOIN, address], env=home | without).stderr
                    assert "requires another token, or any; export RAY_AUTH_MODE=token" in told
            finally:
                head.terminate()
                head.wait(90)


@pytest.mark.proof
def test_the_address_local_starts_a_cluster_with_room_for_every_stage(tmp_path: Path) -> None:
    arguments = ["generate", "--config", "conf/tiny_t2v.yaml", "--prompt", "x", "--num-inference-steps", "1"]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    more = ["--output", str(tmp_path / "x.mp4"), "stages.transformer.replicas=3"]
    assert subprocess.run([*COMMAND, *arguments, *more], check=False, env=environment, timeout=500).returncode == 0
