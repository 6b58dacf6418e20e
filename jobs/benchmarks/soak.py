"""Many requests while replicas are killed or stopped every few seconds: none lost, none twice, nothing growing."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from benchmarks.machine import subplots

from disagg_ray import LocalPipeline, Pipeline, Request, Result

CONFIG = "conf/tiny_t2v.yaml"
OVERRIDES = (
    "stages.transformer.replicas=2",
    "failures.stall_s=15",
    "failures.max_attempts=50",
    "transport.timeout_s=5",
)
KINDS = 8
"""Different videos, each made once without disturbance to compare with."""
SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Sample:
    """What processes hold at one moment; those of replicas are the most that any one of them holds."""

    seconds: float
    done: int
    driver: dict[str, float]
    replica: dict[str, float]
    shared_files: int
    driver_bytes: int
    """Of the driver's pool, which requests take."""


@dataclass
class Watch:
    """Samples and strikes at fixed intervals on threads of its own until `end` is set."""

    pipeline: Pipeline
    seed: int
    kill_every_s: float
    sample_every_s: float
    end: threading.Event = field(default_factory=threading.Event)
    samples: list[Sample] = field(default_factory=list)
    strikes: Counter[str] = field(default_factory=Counter)
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def sample(self) -> None:
        while not self.end.wait(self.sample_every_s):
            replicas = [measured for info in self.pipeline.replicas if (measured := _measure(info.pid))]
            most = {name: max((r[name] for r in replicas), default=0.0) for name in ("rss_mb", "threads", "files")}
            self.samples.append(Sample(
                time.monotonic() - self.began, self.done, _measure(os.getpid()) or {}, most,
                sum(1 for _ in SHARED.iterdir()), self.pipeline.driver_bytes_in_use,
            ))  # fmt: skip

    def strike(self) -> None:
        draw = random.Random(self.seed)
        while not self.end.wait(self.kill_every_s):
            stage = draw.choice(list(self.pipeline.config.stages))
            how = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
            if serving := [replica for replica in self.pipeline.replicas if replica.stage == stage]:
                _signal(draw.choice(serving).pid, how)
                self.strikes[f"{stage} {how.name}"] += 1


def _measure(pid: int) -> dict[str, float] | None:
    try:
        process = psutil.Process(pid)
        return {
            "rss_mb": process.memory_info().rss / 2**20,
            "threads": float(process.num_threads()),
            "files": float(process.num_fds()),
        }
    except psutil.NoSuchProcess:
        return None


def _signal(pid: int, how: signal.Signals) -> None:
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        return  # it was dead already


def _requests(count: int) -> Iterator[Request]:
    for number in range(count):
        yield Request(id=f"r{number}", **_content(number % KINDS))


def _content(kind: int) -> dict[str, Any]:
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6}
    return {"prompt": f"a red circle {kind}", "seed": kind} | size


def run(num_requests: int, kill_every_s: float, seed: int) -> dict[str, Any]:
    """Run the requests through a pipeline under fire.

    Raises:
        AssertionError: a video is lost, came twice, differs from an undisturbed one, or slots are taken at the end.
    """
    local = LocalPipeline.from_config(CONFIG)
    expected = [local.generate(Request(**_content(kind))).data for kind in range(KINDS)]
    local.close()
    with Pipeline.from_config(CONFIG, *OVERRIDES) as pipeline:
        watch = Watch(pipeline, seed, kill_every_s, sample_every_s=2.0)
        threads = [threading.Thread(target=loop, daemon=True) for loop in (watch.sample, watch.strike)]
        for thread in threads:
            thread.start()
        seen: Counter[str] = Counter()
        attempts: Counter[str] = Counter()
        for result in pipeline.generate_all(_requests(num_requests)):
            seen[result.request.id] += 1
            watch.done += 1
            assert result.data == expected[int(result.request.id[1:]) % KINDS], f"{result.request.id} differs"
            attempts.update(_extra(result))
        seconds = time.monotonic() - watch.began
        watch.end.set()
        for thread in threads:
            thread.join()
        restarts = pipeline.num_restarts
        _check_empty(pipeline)
    assert len(seen) == num_requests and set(seen.values()) == {1}, "a request was lost, or done twice"
    return {
        "requests": num_requests, "seconds": seconds, "seed": seed, "strikes": dict(watch.strikes),
        "restarts": restarts, "attempts_more_than_one": dict(attempts),
        "samples": [asdict(sample) for sample in watch.samples],
    }  # fmt: skip


def _extra(result: Result) -> dict[str, int]:
    return {timing.stage: timing.attempts - 1 for timing in result.stages if timing.attempts > 1}


def _check_empty(pipeline: Pipeline, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    posts = sum(stage.num_replicas for stage in pipeline.config.stages.values())
    while len(pipeline.replicas) < posts or any(h.bytes_in_use for h in pipeline.health().values()):
        assert time.monotonic() < deadline, "slots are taken, or a replica did not come back"
        time.sleep(0.2)
    assert pipeline.driver_bytes_in_use == 0, "the driver's pool is not empty"


def report(result: Mapping[str, Any], folder: Path) -> None:
    """Plot what was held over time, and print the rest."""
    _plot([Sample(**sample) for sample in result["samples"]], folder / "bench_soak.png")
    print(json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=2))


def _plot(samples: Sequence[Sample], path: Path) -> None:
    figure, axes = subplots(5, 1, figsize=(8, 11), sharex=True)
    seconds = [sample.seconds for sample in samples]
    for axis, name in zip(axes, ("rss_mb", "threads", "files"), strict=False):
        axis.plot(seconds, [sample.driver.get(name, 0) for sample in samples], label="driver")
        axis.plot(seconds, [sample.replica.get(name, 0) for sample in samples], label="largest replica")
        axis.set(ylabel=name)
        axis.set_ylim(bottom=0)
        axis.legend()
    axes[3].plot(seconds, [sample.shared_files for sample in samples])
    axes[3].set(ylabel="files in /dev/shm")
    axes[4].plot(seconds, [sample.done for sample in samples])
    axes[4].set(ylabel="videos done", xlabel="seconds")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
