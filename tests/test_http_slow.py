"""Clients that read slowly, never, or go away: nobody waits for them, and nothing of them is left."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import helpers
import http_load
import pytest
from http_load import DEADLINE_S, SETTINGS, Client, Results

pytestmark = pytest.mark.proof

NUM_STUCK = 50
"""More than the forty threads that the routes of a process share."""
BIG_BYTES = 8 * 2**20
"""Of a video: more than the sockets on its way buffer."""
LONG = SETTINGS | {"num_inference_steps": 100, "size": "64x64"}
FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\n'
OPEN = re.compile(r"^\S*disagg_ray_http_requests_open\{.*\} (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slow")


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """Give the port of a service whose videos are in the folder."""
    port = helpers.free_port()
    with http_load.serving(folder, port):
        yield port


def ask(port: int, path: str) -> socket.socket:
    """Ask for something and read the first line of the answer; the rest waits in the socket's small buffer."""
    asking = socket.socket()
    asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    asking.settimeout(DEADLINE_S)
    asking.connect((helpers.HOST, port))
    asking.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode())
    assert asking.recv(12) == b"HTTP/1.1 200"
    return asking


def hang_up(port: int, kind: str, sent: bytes, wait_s: float) -> None:
    """Send the first part of a longer body, wait until it has been read, and go away."""
    with socket.create_connection((helpers.HOST, port), DEADLINE_S) as sending:
        head = f"POST /v1/videos HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: {kind}\r\n"
        sending.sendall(f"{head}Content-Length: {len(sent) + 2**22}\r\n\r\n".encode() + sent)
        time.sleep(wait_s)


def status_of(client: Client, video_id: str) -> str:
    return str(json.loads(client.ask(f"/v1/videos/{video_id}"))["status"])


def num_open(client: Client) -> float:
    """Return how many requests are being answered."""
    return sum(map(float, OPEN.findall(client.ask("/metrics").decode())))


def test_readers_of_videos_that_stop_hold_up_nobody_and_get_the_rest_when_they_go_on(port: int, folder: Path) -> None:
    client = Client(port)
    (made,) = http_load.make_videos(client, "big", 1, Results())
    file = folder / "videos" / f"{made}.mp4"
    content = file.read_bytes() * (BIG_BYTES // file.stat().st_size + 1)
    file.write_bytes(content)
    with ExitStack() as stack:
        stuck = [stack.enter_context(ask(port, f"/v1/videos/{made}/content")) for _ in range(NUM_STUCK)]
        http_load.make_videos(client, "beside", 3, results := Results())
        http_load.check(results)
        answer = stuck[0].makefile("rb").read()
        assert answer.partition(b"\r\n\r\n")[2] == content


def test_readers_of_events_that_stop_hold_up_neither_their_job_nor_others(port: int) -> None:
    client = Client(port)
    long = json.loads(client.ask("/v1/videos", LONG))["id"]
    with ExitStack() as stack:
        for _ in range(NUM_STUCK):
            stack.enter_context(ask(port, f"/v1/videos/{long}/events"))
        http_load.make_videos(client, "among", 3, results := Results())
        http_load.check(results)
        helpers.wait_until(lambda: status_of(client, long) == "completed", "the job never ends", DEADLINE_S)


def test_of_clients_that_go_away_from_a_stream_nothing_is_left_and_their_job_goes_on(port: int) -> None:
    client = Client(port)
    minutes = LONG | {"size": "256x256", "num_frames": 33}
    ahead, last = (json.loads(client.ask("/v1/videos", minutes))["id"] for _ in range(2))
    for asking in [ask(port, f"/v1/videos/{last}/events") for _ in range(NUM_STUCK)]:
        asking.close()
    helpers.wait_until(lambda: num_open(client) <= 1, "streams of clients that went are still answered", DEADLINE_S)
    assert status_of(client, last) in ("queued", "in_progress")
    for video_id in (ahead, last):
        client.delete(f"/v1/videos/{video_id}")


def test_clients_that_go_away_while_they_send_leave_no_job_no_file_and_no_fault(port: int, folder: Path) -> None:
    client, before = Client(port), {path.name for path in (folder / "videos").iterdir()}
    jobs, form = client.list(), PART + bytes(2**21)
    for kind, sent in ((FORM, form), ("application/json", b'{"prompt": "' + bytes(2**21)), ("application/json", b"")):
        for wait_s in (0.0, 1.0):
            hang_up(port, kind, sent, wait_s)
    log = folder / "log"
    helpers.wait_until(lambda: "the client hung up" in log.read_text(), "no hang-up is logged", DEADLINE_S)
    assert "Traceback" not in log.read_text()
    assert client.list() == jobs
    assert {path.name for path in (folder / "videos").iterdir()} == before
