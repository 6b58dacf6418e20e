"""A service under bursts and deaths.

python jobs/bench.py service bursts outputs/service.png   # first video after connect; replicas, queue, waits
python jobs/bench.py service deaths                        # three drivers share one while its processes are killed
python jobs/bench.py service answers                       # how soon replicas say how they are while they compute
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import ray

from disagg_ray import Connection, Handle, LocalPipeline, Request, connect, load_config
from disagg_ray.driver import names
from disagg_ray.driver.names import find_replicas
from disagg_ray.media.video import blank
from disagg_ray.service import lifecycle

NAME = "bench"
CONFIG = "conf/tiny_t2v.yaml"
IMAGE_CONFIG = "conf/tiny_i2v.yaml"
"""Its encoder computes long enough to be asked meanwhile."""
OVERRIDES = (
    "stages.transformer.replicas={min: 1, max: 3}", "stages.decoder.replicas={min: 1, max: 2}",
    "service.target_wait_s=8", "service.patience_s=2", "service.idle_s=12",
)  # fmt: skip
BURSTS = ((0.0, 2), (10.0, 24))
"""(seconds, requests that come at once)."""
QUIET_S = 30.0
"""After the last video."""
SAMPLE_S = 0.5
NUM_CONNECTIONS = 7
LINE_SHIFT = 0.04
"""Keeps equal numbers of replicas apart in the plot."""

DEATHS = (
    "stages.encoder.replicas=2", "stages.transformer.replicas=3", "stages.decoder.replicas=2",
    "service.client_timeout_s=5",
)  # fmt: skip
NUM_ASKS, ASK_EVERY_S = 50, 0.05
"""Of each stage, while it computes."""
NUM_ASKED = 40
"""Requests that keep the stages computing; what is left of them is cancelled."""

NUM_EACH = 12
NUM_DEATHS, DEATH_EVERY_S = 6, 6.0
SUPERVISOR_DIES, DRIVER_DIES = (1, 4), 2
"""At which deaths."""
DOOMED = """
import sys
from disagg_ray import Request, connect
connection = connect(sys.argv[1], address=sys.argv[2], run_id="doomed")
handles = [connection.submit(Request(prompt="a cat", num_inference_steps=20, num_frames=17, seed=seed))
           for seed in range(int(sys.argv[3]))]
print("submitted", flush=True)
for handle in handles:
    handle.result()
"""


@dataclass(frozen=True)
class Sample:
    seconds: float
    queued: int
    """Requests that no replica has taken."""
    wanted: dict[str, int]
    ready: dict[str, int]


@dataclass(frozen=True)
class Served:
    came: float
    seconds: float
    """Until its video was there."""


def make_request(seed: int) -> Request:
    return Request(prompt="a red circle moves left on white", seed=seed, num_inference_steps=20, num_frames=17)


def main(arguments: Sequence[str]) -> None:
    what, *arguments = arguments
    ray.init(address="local", num_cpus=16, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    configs = {"deaths": (CONFIG, *DEATHS), "answers": (IMAGE_CONFIG,), "bursts": (CONFIG, *OVERRIDES)}
    began = time.monotonic()
    snapshot = lifecycle.up(NAME, load_config(*configs[what]))
    print(f"{len(snapshot.replicas)} replicas up in {time.monotonic() - began:.1f} s", flush=True)
    try:
        {"deaths": measure_deaths, "answers": measure_answers, "bursts": measure_bursts}[what](*arguments)
    finally:
        lifecycle.down(NAME, 0.0)
        print(f"left when down: {names.services()}, {[actor.name for actor in find_replicas(NAME)]}")
        ray.shutdown()


def measure_bursts(output: str) -> None:
    first, steady = measure_first()
    print(f"first video after connect {first:.2f} s, steady {steady:.2f} s: {first / steady:.2f} x", flush=True)
    with connect(NAME) as connection:
        samples, served = run_bursts(connection)
    for came, number in BURSTS:
        waits = [one.seconds for one in served if one.came == came]
        print(f"burst at {came:.0f} s of {number}: mean {np.mean(waits):.1f} s, longest {max(waits):.1f} s")
    plot(samples, served, output)


def measure_answers() -> None:
    """Ask each replica how it is until it has answered often enough while it computed."""
    asked = dict.fromkeys((actor.name for actor in find_replicas(NAME)), 0)
    waits: dict[str, list[float]] = {name: [] for name in asked}
    size = {"height": 128, "width": 128, "num_frames": 33, "num_inference_steps": 20}
    with connect(NAME) as connection:
        for seed in range(NUM_ASKED):
            connection.submit(Request(prompt="a red circle", image=blank(128, 128), seed=seed, **size))
        while min(map(len, waits.values())) < NUM_ASKS:
            for actor in find_replicas(NAME):
                began = time.monotonic()
                health = ray.get(actor.call("health"))
                asked[actor.name] += 1
                if health.stalled_s:
                    waits[actor.name].append(time.monotonic() - began)
            time.sleep(ASK_EVERY_S)
    for name, seconds in waits.items():
        median, longest = 1000 * np.median(seconds), 1000 * max(seconds)
        print(
            f"{name}: {len(seconds)} of {asked[name]} asks while it computed: {median:.0f} ms, longest {longest:.0f} ms"
        )


def measure_deaths() -> None:
    """Two drivers and one that is killed ask for as much each; the supervisor is killed twice, replicas in between."""
    address = ray.get_runtime_context().gcs_address
    doomed = subprocess.Popen([sys.executable, "-c", DOOMED, NAME, address, str(NUM_EACH)], stdout=subprocess.PIPE)
    assert doomed.stdout is not None
    doomed.stdout.readline()
    drivers = [connect(NAME, run_id=f"driver {number}") for number in range(2)]
    began, ended, handles = time.monotonic(), dict[tuple[int, int], float](), dict[tuple[int, int], Handle]()
    for seed in range(NUM_EACH):
        for number, driver in enumerate(drivers):
            handle = handles[number, seed] = driver.submit(make_request(seed))
            handle.add_done_callback(lambda _, key=(number, seed): ended.setdefault(key, time.monotonic() - began))
    for turn in range(NUM_DEATHS):
        time.sleep(DEATH_EVERY_S)
        snapshot = drivers[0].snapshot()
        replica = random.Random(turn).choice(snapshot.replicas)
        name, pid = ("supervisor", snapshot.pid) if turn in SUPERVISOR_DIES else (replica.name, replica.pid)
        if turn == DRIVER_DIES:
            doomed.kill()
            name += " and a driver"
        print(f"{time.monotonic() - began:.0f} s: {name} killed, {len(ended)} of {len(handles)} done", flush=True)
        os.kill(pid, signal.SIGKILL)
    results = {key: handle.result() for key, handle in handles.items()}
    local = LocalPipeline.from_config(CONFIG)
    expected = {seed: local.generate(make_request(seed)).data for seed in range(NUM_EACH)}
    equal = sum(result.data == expected[seed] for (_, seed), result in results.items())
    print(f"{len(results)} done, {equal} of them identical to one process's")
    for number in range(len(drivers)):
        seconds = [s for (driver, _), s in ended.items() if driver == number]
        print(f"driver {number}: mean {np.mean(seconds):.1f} s, last {max(seconds):.1f} s")
    deadline = time.monotonic() + 60
    while any(health.bytes_in_use for health in drivers[0].health().values()):
        assert time.monotonic() < deadline, drivers[0].health()
        time.sleep(0.5)
    snapshot = drivers[0].snapshot()
    print(f"slots are 0, the supervisor's {snapshot.driver_bytes_in_use}, clients {sorted(snapshot.clients)}")
    for driver in drivers:
        driver.close()


def measure_first() -> tuple[float, float]:
    """Return the median seconds of the first video of a connection, and of the second; replicas have served before."""
    pairs = []
    for seed in range(NUM_CONNECTIONS + 1):
        with connect(NAME) as connection:
            pairs.append([time_video(connection, 2 * seed + number) for number in range(2)])
    first, steady = np.median(pairs[1:], axis=0)
    return float(first), float(steady)


def time_video(connection: Connection, seed: int) -> float:
    began = time.monotonic()
    connection.generate(make_request(seed))
    return time.monotonic() - began


def run_bursts(connection: Connection) -> tuple[list[Sample], list[Served]]:
    began, samples, served, over = time.monotonic(), list[Sample](), list[Served](), threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_S):
            snapshot = connection.snapshot()
            queued = snapshot.queued + sum(stage.waiting for stage in snapshot.stages)
            wanted = {stage.stage: stage.wanted for stage in snapshot.stages}
            ready = {stage.stage: stage.ready for stage in snapshot.stages}
            samples.append(Sample(time.monotonic() - began, queued, wanted, ready))

    watcher = threading.Thread(target=watch)
    watcher.start()
    handles = []
    for at, number in BURSTS:
        time.sleep(max(0.0, began + at - time.monotonic()))
        for seed in range(number):
            handle = connection.submit(make_request(seed))
            handle.add_done_callback(lambda _, at=at: served.append(Served(at, time.monotonic() - began - at)))
            handles.append(handle)
    for handle in handles:
        handle.result()
    time.sleep(QUIET_S)
    over.set()
    watcher.join()
    return samples, served


def plot(samples: list[Sample], served: list[Served], output: str) -> None:
    figure, (replicas, queue, waits) = plt.subplots(3, sharex=True, figsize=(9, 7))
    times = [sample.seconds for sample in samples]
    for place, stage in enumerate(samples[0].ready):
        colour, shift = f"C{place}", LINE_SHIFT * (1 - place)
        replicas.step(times, [s.ready[stage] + shift for s in samples], colour, where="post", label=stage)
        replicas.step(times, [s.wanted[stage] + shift for s in samples], colour, where="post", linestyle=":")
    replicas.set_ylabel("replicas (dotted: wanted)")
    replicas.legend(loc="lower right", ncols=3)
    queue.fill_between(times, [sample.queued for sample in samples], step="post")
    queue.set_ylabel("requests waiting")
    waits.scatter([one.came + one.seconds for one in served], [one.seconds for one in served], s=12)
    waits.set_ylabel("seconds to the video")
    waits.set_xlabel("seconds")
    for axis in (replicas, queue, waits):
        axis.set_ylim(bottom=0)
        for at, _ in BURSTS:
            axis.axvline(at, color="0.8", zorder=0)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
