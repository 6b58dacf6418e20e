"""Sixty requests on three nodes while replicas of every stage are killed, stopped, hang or break, and a node is killed.

python tests/chaos.py FOLDER [SEED]    # prints what was struck; ends with 0 if nothing was lost or done twice
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from faulty import Faults, faulty_replicas
from ray.cluster_utils import Cluster

from disagg_ray import LocalPipeline, Pipeline, Request, Result
from disagg_ray.replica.messages import ReplicaInfo

T2V = "conf/tiny_t2v.yaml"
NUM_REQUESTS = 60
PROMPTS = ("a red circle", "a blue square moving left", "a green triangle")
NUM_CPUS = 4
"""Of each node: seven replicas fit on two of three nodes."""
OVERRIDES = (
    "stages.encoder.replicas=2", "stages.transformer.replicas=3", "stages.decoder.replicas=2",
    "stages.encoder.placement=spread", "stages.transformer.placement=spread", "stages.decoder.placement=spread",
    "failures.stall_s=20", "failures.max_attempts=5", "transport.timeout_s=5",
)  # fmt: skip
STRIKES: tuple[tuple[str, signal.Signals | str], ...] = (
    ("transformer", signal.SIGKILL), ("encoder", signal.SIGKILL), ("decoder", signal.SIGKILL),
    ("transformer", signal.SIGSTOP), ("node", signal.SIGKILL), ("transformer", signal.SIGKILL),
    ("decoder", "encode"), ("transformer", "compute"),
)  # fmt: skip
"""What is struck, and with which signal or at which weak point."""
WEAK_POINTS = {"encode": "stall", "compute": "break"}
"""What happens there: it hangs, or the replica lives and fails whatever it computes from then on."""
EVERY = 6
"""Videos between two strikes."""
SURE_S = 300.0


def content(number: int) -> dict[str, Any]:
    kind = number % (2 * len(PROMPTS))
    return {"prompt": PROMPTS[kind // 2], "seed": kind, "height": 32, "width": 32, "num_frames": 5,
            "num_inference_steps": 8}  # fmt: skip


class Killer:
    """Strikes replicas and nodes, drawn by a seed."""

    def __init__(self, seed: int, pipeline: Pipeline, faults: Faults, kill_node: Callable[[], None]) -> None:
        self._random = random.Random(seed)
        self._pipeline, self._faults, self._kill_node = pipeline, faults, kill_node
        self._left = list(STRIKES)
        self._random.shuffle(self._left)
        self._struck: set[int] = set()
        """Process ids: what is stopped is to be found out, not killed."""

    def strike(self) -> None:
        if not self._left:
            return
        stage, how = self._left.pop()
        if stage == "node":
            print("strike: a node", flush=True)
            self._kill_node()
            return
        if isinstance(how, str):
            print("strike:", WEAK_POINTS[how], how, flush=True)
            self._faults.set(f"{stage}.{how}", WEAK_POINTS[how])
            return
        victim = self._choose(stage)
        print("strike:", how.name, victim.name, flush=True)
        self._struck.add(victim.pid)
        os.kill(victim.pid, how)

    def _choose(self, stage: str) -> ReplicaInfo:
        deadline = time.monotonic() + SURE_S
        while not (serving := [r for r in self._pipeline.replicas if r.stage == stage and r.pid not in self._struck]):
            assert time.monotonic() < deadline, f"no {stage} came back"
            time.sleep(0.1)
        return self._random.choice(serving)

    @property
    def is_done(self) -> bool:
        return not self._left


def watch_copies(pipeline: Pipeline) -> dict[str, float]:
    """Return a dictionary that gets the time at which the driver held each request's latents."""
    driver_pool, held = pipeline.engine.driver_pool, {}
    assert driver_pool is not None
    hold = driver_pool.hold

    async def watched(key: Any, handoff: Any) -> Any:
        copy = await hold(key, handoff)
        held.setdefault(key.request_id.rpartition(".")[0], time.time())
        return copy

    driver_pool.hold = watched  # type: ignore[method-assign]
    return held


def check(results: Sequence[Result], faults: Faults, held: dict[str, float]) -> None:
    local = LocalPipeline.from_config(T2V)
    expected = [local.generate(Request(**content(number))).data for number in range(2 * len(PROMPTS))]
    assert sorted(result.request.id for result in results) == sorted(f"r{number}" for number in range(NUM_REQUESTS))
    for result in results:
        assert result.data == expected[int(result.request.id[1:]) % len(expected)], f"{result.request.id} differs"
    again = [
        name for began, stage, name in faults.computed() if stage == "transformer" and began > held.get(name, began)
    ]
    assert not again, f"denoised though the driver held the latents: {again}"
    denoised = Counter(name for _, stage, name in faults.computed() if stage == "transformer")
    for result in results:
        attempts = {timing.stage: timing.attempts for timing in result.stages}
        assert 1 <= denoised[result.request.id] <= attempts["transformer"]
    print("denoised:", dict(Counter(denoised.values())), "attempts:", Counter(
        (t.stage, t.attempts) for result in results for t in result.stages if t.attempts > 1))  # fmt: skip


def check_empty(pipeline: Pipeline) -> None:
    deadline = time.monotonic() + SURE_S
    while len(pipeline.replicas) < 7 or any(health.bytes_in_use for health in pipeline.health().values()):
        assert time.monotonic() < deadline, f"slots are taken or replicas missing: {pipeline.replicas}"
        time.sleep(0.2)
    assert pipeline.driver_bytes_in_use == 0


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": NUM_CPUS, "include_dashboard": False}, connect=True
    )
    nodes = [cluster.add_node(num_cpus=NUM_CPUS) for _ in range(2)]
    cluster.wait_for_nodes()
    began = time.monotonic()
    with faulty_replicas(folder) as faults, Pipeline.from_config(T2V, *OVERRIDES) as pipeline:
        print(f"ready after {time.monotonic() - began:.1f} s")
        held = watch_copies(pipeline)
        killer = Killer(seed, pipeline, faults, lambda: cluster.remove_node(nodes[0], allow_graceful=False))
        results = []
        for result in pipeline.generate_all(Request(id=f"r{n}", **content(n)) for n in range(NUM_REQUESTS)):
            results.append(result)
            if len(results) % EVERY == 0:
                killer.strike()
        assert killer.is_done and (folder / "at.decoder.encode").exists()
        print(f"{len(results)} videos after {time.monotonic() - began:.1f} s, restarts: {pipeline.num_restarts}")
        check(results, faults, held)
        check_empty(pipeline)
    ray.shutdown()
    cluster.shutdown()
    print("nothing lost, nothing twice")


if __name__ == "__main__":
    main()
