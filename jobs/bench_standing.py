"""A standing pipeline under bursts: the first video after connecting, and replicas, queue and waits over time.

python jobs/bench_standing.py outputs/standing.png [key=value]
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import ray

from disagg_ray import Connection, Pipeline, Request, load_config, stand

NAME = "bench"
CONFIG = "conf/tiny_t2v.yaml"
OVERRIDES = (
    "stages.transformer.replicas={min: 1, max: 3}", "stages.decoder.replicas={min: 1, max: 2}",
    "standing.target_wait_s=8", "standing.patience_s=2", "standing.idle_s=15",
)  # fmt: skip
BURSTS = ((0.0, 3), (10.0, 24), (100.0, 2))
"""(seconds, requests that come at once)."""
LENGTH_S = 130.0
SAMPLE_S = 0.5
NUM_STEADY = 5


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


def main() -> None:
    output, *overrides = sys.argv[1:]
    ray.init(address="local", num_cpus=16, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    stand.up(NAME, load_config(CONFIG, *OVERRIDES, *overrides))
    try:
        first, steady = measure_first()
        print(f"first video after connect {first:.2f} s, steady {steady:.2f} s: {first / steady:.2f} x")
        with Pipeline.connect(NAME) as connection:
            samples, served = run_bursts(connection)
        for came, number in BURSTS:
            waits = [one.seconds for one in served if one.came == came]
            print(f"burst at {came:.0f} s of {number}: mean {np.mean(waits):.1f} s, longest {max(waits):.1f} s")
        plot(samples, served, output)
    finally:
        stand.down(NAME, 0.0)
        ray.shutdown()


def measure_first() -> tuple[float, float]:
    """Return the seconds of the first video, connecting left out and included weights alike, and the median later."""
    with Pipeline.connect(NAME) as warm:  # the replicas themselves have served before
        warm.generate(make_request(0))
    with Pipeline.connect(NAME) as connection:
        seconds = []
        for seed in range(1, NUM_STEADY + 2):
            began = time.monotonic()
            connection.generate(make_request(seed))
            seconds.append(time.monotonic() - began)
    return seconds[0], float(np.median(seconds[1:]))


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
    time.sleep(max(0.0, began + LENGTH_S - time.monotonic()))
    over.set()
    watcher.join()
    return samples, served


def plot(samples: list[Sample], served: list[Served], output: str) -> None:
    figure, (replicas, queue, waits) = plt.subplots(3, sharex=True, figsize=(9, 7))
    times = [sample.seconds for sample in samples]
    for colour, stage in zip(("C0", "C1", "C2"), samples[0].ready, strict=True):
        replicas.step(times, [s.ready[stage] for s in samples], colour, where="post", label=stage)
        replicas.step(times, [s.wanted[stage] for s in samples], colour, where="post", linestyle=":")
    replicas.set_ylabel("replicas (dotted: wanted)")
    replicas.legend(loc="upper right")
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


if __name__ == "__main__":
    main()
