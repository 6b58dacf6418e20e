"""Two hosts, played by network namespaces: the transformer on one, the driver and the other stages on the other."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from helpers import ray_folder

from disagg_ray import LocalPipeline, Request

pytestmark = pytest.mark.proof

SCRIPT = str(Path(__file__).with_name("netns.sh"))
RAY = str(Path(sys.executable).with_name("ray"))
HEAD, FAR = "10.77.0.1", "10.77.0.2"
PORT = 6379
T2V = "conf/tiny_t2v.yaml"
REQUEST = {"prompt": "a red circle", "seed": 5, "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4}
DRIVER = f"""
import json, sys
from hashlib import sha256
from disagg_ray import Pipeline, Request
with Pipeline.from_config({T2V!r}, "cluster.address={HEAD}:{PORT}", "stages.transformer.resources.far=1") as pipeline:
    result = pipeline.generate(Request(**{REQUEST!r}))
    hosts = {{replica.stage: replica.host for replica in pipeline.replicas}}
    sessions = [name for replica in pipeline.replicas for name in replica.sessions]
    print(json.dumps([sha256(result.data).hexdigest(), hosts, sessions, [stage.route for stage in result.stages]]))
"""


@pytest.fixture
def name() -> Iterator[str]:
    """Give two joined namespaces, by the name they share."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    name = f"disagg-{secrets.token_hex(3)}"
    made = subprocess.run([SCRIPT, "up", name], capture_output=True, text=True, check=False)
    try:
        if made.returncode:
            pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        yield name
    finally:
        subprocess.run([SCRIPT, "down", name], check=True)


@contextmanager
def ray_node(namespace: str, environment: dict[str, str], log: Path, *options: str) -> Iterator[None]:
    command = ["ip", "netns", "exec", namespace, RAY, "start", "--block", "--num-cpus=4", "--disable-usage-stats"]
    with log.open("w") as file:
        node = subprocess.Popen([*command, *options], env=environment, stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + 240
            while "Ray runtime started" not in log.read_text():
                assert node.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield
        finally:
            node.terminate()
            node.wait(60)


def test_video_is_the_same_when_the_transformer_is_on_another_host(name: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = ["--head", f"--port={PORT}", f"--node-ip-address={HEAD}", "--include-dashboard=false"]
    far = [f"--address={HEAD}:{PORT}", f"--node-ip-address={FAR}", '--resources={"far": 1}']
    with ray_folder() as folder, ExitStack() as stack:
        nodes = (f"{name}-a", "head.log", [*head, f"--temp-dir={folder}"]), (f"{name}-b", "far.log", far)
        for namespace, log, options in nodes:
            stack.enter_context(ray_node(namespace, environment, tmp_path / log, *options))
        done = subprocess.run(
            ["ip", "netns", "exec", f"{name}-a", sys.executable, "-c", DRIVER],
            env=environment, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    digest, hosts, sessions, routes = json.loads(done.stdout.splitlines()[-1])
    assert hosts == {"encoder": HEAD, "transformer": FAR, "decoder": HEAD}
    assert {session.rpartition(":")[0] for session in sessions} == {HEAD, FAR}
    assert routes == ["none", "tcp", "tcp"]
    expected = LocalPipeline.from_config(T2V).generate(Request(**REQUEST)).data
    assert expected is not None and digest == sha256(expected).hexdigest()
