"""What tests and the scripts they run share beside fixtures: waiting with a deadline, stages, ports and folders."""

import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imageio_ffmpeg
import psutil

from disagg_ray import Pipeline
from disagg_ray.config.schema import Config
from disagg_ray.driver.address import find_cluster
from disagg_ray.errors import StartError
from disagg_ray.graph import build_graph
from disagg_ray.media.sound import Sound, read_wav
from disagg_ray.models.tuning import offload_groups, offload_models
from disagg_ray.replica.stage import Stage
from disagg_ray.service.client import Connection

HOST = "127.0.0.1"


def wait_until(condition: Callable[[], bool], failure: str, timeout_s: float) -> None:
    """Look until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.05)


def copy_changed(model: Path, folder: Path, file: str, changes: dict[str, Any]) -> Path:
    """Return a copy of a model's folder in which values of one of its JSON files are others."""
    copy = Path(shutil.copytree(model, folder / "model"))
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    return copy


def bytes_in_use(pipeline: Pipeline | Connection) -> dict[str, int]:
    """Return what requests take of the pools, by replica, those of nothing left out."""
    used = {name: health.bytes_in_use for name, health in pipeline.health().items()}
    used["driver"] = pipeline.driver_bytes_in_use
    return {name: count for name, count in used.items() if count}


def wait_until_empty(pipeline: Pipeline | Connection, timeout_s: float) -> None:
    """Releases are sent without waiting for their answer; a leak never goes away."""
    deadline = time.monotonic() + timeout_s
    while used := bytes_in_use(pipeline):
        assert time.monotonic() < deadline, f"slots leaked: {used}"
        time.sleep(0.05)


def stop(pid: int) -> None:
    """Have a process stand still: wait until each of its threads, which stop one by one, has stopped."""
    os.kill(pid, signal.SIGSTOP)

    def stands() -> bool:
        try:
            stats = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
        except OSError:  # a thread has ended
            return False
        return all(stat.rpartition(") ")[2][0] == "T" for stat in stats)

    wait_until(stands, f"{pid} does not stop", 60)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Have processes stand still."""
    for pid in pids:
        stop(pid)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # it was replaced
                os.kill(pid, signal.SIGCONT)


def lives(process: psutil.Process | int) -> bool:
    """Return whether a process, or that of an id, has not ended, be it that nobody has asked how."""
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process) if isinstance(process, int) else process
        return found.is_running() and found.status() != psutil.STATUS_ZOMBIE
    return False


def shared_memory_left() -> set[Path]:
    """Return the files of shared memory that no process maps: those of processes that are gone."""
    used = set[str]()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended
            used.update(re.findall(r"/dev/shm/\S+", maps.read_text()))
    return {path for path in Path("/dev/shm").iterdir() if str(path) not in used}


def connect_stages(config: Config) -> dict[str, Stage]:
    """Return a configuration's stages, which know of each other and hold no weights yet."""
    stages = {name: Stage(name, config) for name in config.stages}
    graph = build_graph([stage.ports for stage in stages.values()])
    for stage in stages.values():
        stage.connect(graph)
    return stages


def offload(stage: Stage, how: str) -> None:
    """Have a loaded stage's models wait on the host, where they are: the configuration refuses that as useless."""
    models = [stage.component(name) for name in stage.weights]
    if how == "group":
        for model in models:
            offload_groups(model, "cpu")
    if how == "model":
        offload_models(models, "cpu")


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Give a head node a folder of its own, or whoever starts a Ray later would try to join what is gone.

    Paths of sockets below it are limited to 107 bytes.
    """
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Head:
    """A head node that runs as a child process."""

    pid: int
    environment: dict[str, str]
    """In which clients reach its dashboard."""


@contextmanager
def head_node(log: Path) -> Iterator[Head]:
    """Start a head node with token authentication on; wait until its agent takes jobs."""
    dashboard, programs = free_port(), Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    options = ["--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}"]
    options += ["--num-cpus=8", "--disable-usage-stats", f"--node-ip-address={HOST}"]
    options += [f"--dashboard-agent-listen-port={free_port()}"]  # the session's own Ray has the default one
    place = f"http://{HOST}:{dashboard}"
    client = environment | {"RAY_ADDRESS": place, "RAY_DASHBOARD_ADDRESS": place}
    with ray_folder() as folder, log.open("w") as sink:
        command = [f"{programs}/ray", "start", *options, f"--temp-dir={folder}"]
        head = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
        try:
            _wait_for_agent(client)
            yield Head(head.pid, client)
        finally:
            head.terminate()
            head.wait(90)  # it waits 30 s for actors that still run


def _wait_for_agent(client: dict[str, str]) -> None:
    """The head answers before its agent takes jobs: wait until one is taken."""
    deadline, command = time.monotonic() + 240, ["ray", "job", "submit", "--no-wait", "--", "true"]
    while (asked := subprocess.run(command, env=client, capture_output=True, text=True, check=False)).returncode:
        assert time.monotonic() < deadline, f"the head node did not come up: {asked.stdout}{asked.stderr}"
        time.sleep(1)


def refusal(address: str) -> str:
    """Return why this machine cannot join a cluster; empty if it can."""
    try:
        find_cluster(address)
    except StartError as error:
        return str(error)
    return ""


def free_port() -> int:
    """Return a port that nobody listens on, and that the system gives to nobody before it is used."""
    return next(port for port in in_any_order(range(30_000, 32_768)) if is_free(port))


def in_any_order(ports: range) -> list[int]:
    """Return ports so that two processes that look for a free one at once find different ones."""
    return random.SystemRandom().sample(ports, len(ports))


def is_free(port: int) -> bool:
    """Return whether nobody listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> str:
    """Return a range of ports that nobody listens on."""
    for first in in_any_order(range(20_000, 30_000 - count, count)):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind((HOST, port))
            except OSError:
                continue
        return f"{first}-{first + count - 1}"
    raise AssertionError("every port is taken")


def heard(file: bytes, folder: Path) -> Sound:
    """Return the sound of a file as ffmpeg decodes it."""
    (folder / "file").write_bytes(file)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(folder / "file"), "-vn", "-c:a", "pcm_f32le"]
    subprocess.run([*command, "-y", str(folder / "sound.wav")], check=True)
    return read_wav((folder / "sound.wav").read_bytes())
