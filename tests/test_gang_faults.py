"""Ranks that die, hang or are cancelled: the same video, and no process, bundle or slot is left of what was lost."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import helpers
import pytest
from faulty import Faults
from helpers import lives
from ray.util import placement_group_table

from disagg_ray import Cancelled, LocalPipeline, Pipeline, Request
from disagg_ray.replica.messages import ReplicaInfo

pytestmark = pytest.mark.proof

T2V = Path(__file__).parent.parent / "conf/tiny_t2v.yaml"
T = "stages.transformer"
SURE = 240.0
"""Seconds; what takes longer hangs."""

wait_until = partial(helpers.wait_until, timeout_s=SURE)


def ask(name: str, steps: int = 4) -> Request:
    return Request("a red circle", seed=5, height=32, width=32, num_frames=5, num_inference_steps=steps, id=name)


@pytest.fixture(scope="module")
def started(cluster: None, faults: Faults) -> Iterator[Pipeline]:
    given = (f"{T}.parallel.ulysses=2", f"{T}.num_threads=1", "failures.stall_s=20", "failures.max_attempts=4")
    with Pipeline.from_config(T2V, *given) as pipeline:
        yield pipeline
    wait_until(lambda: living_bundles() == 0, "bundles are left")


@pytest.fixture
def pipeline(started: Pipeline) -> Iterator[Pipeline]:
    """Give the pipeline; afterwards wait until all serve, nothing is held, and nothing is left of gangs before."""
    before = gang(started)
    yield started
    wait_until(lambda: len(started.replicas) == 3, "a replica did not come back")
    wait_until(lambda: not any(h.bytes_in_use for h in started.health().values()), "a pool keeps slots")
    wait_until(lambda: living_bundles() == 1, "bundles are left")
    wait_until(lambda: all(lives(rank.pid) for rank in gang(started).ranks), "a gang that lost a rank serves on")
    lost = {rank.pid for rank in before.ranks} - {rank.pid for rank in gang(started).ranks}
    wait_until(lambda: not any(map(lives, lost)), "a rank of a lost gang lives on")


@pytest.fixture(scope="module")
def video() -> Callable[[int], bytes | None]:
    local = LocalPipeline.from_config(T2V)
    return cache(lambda steps=4: local.generate(ask("local", steps)).data)


def gang(pipeline: Pipeline) -> ReplicaInfo:
    wait_until(lambda: any(replica.ranks for replica in pipeline.replicas), "no gang serves")
    return next(replica for replica in pipeline.replicas if replica.ranks)


def living_bundles() -> int:
    table: dict[str, Any] = placement_group_table()
    return sum(group["state"] != "REMOVED" for group in table.values())


@pytest.mark.parametrize(("point", "rank"), [("pull", 0), ("step", 0), ("step", 1), ("publish", 1)])
def test_a_rank_that_dies_takes_its_gang_with_it_and_the_video_is_the_same(
    pipeline: Pipeline, faults: Faults, video: Any, point: str, rank: int
) -> None:
    ranks = gang(pipeline).ranks
    faults.set(f"transformer.{point}", "wait")
    handle = pipeline.submit(ask(f"{point}-{rank}"))
    faults.await_arrival(f"transformer.{point}")
    os.kill(ranks[rank].pid, signal.SIGKILL)
    faults.clear(f"transformer.{point}")
    assert handle.result(SURE).data == video(4)


def test_a_rank_that_stops_is_noticed_and_ended(pipeline: Pipeline, faults: Faults, video: Any) -> None:
    ranks = gang(pipeline).ranks
    faults.set("transformer.step", "wait")
    handle = pipeline.submit(ask("stopped"))
    faults.await_arrival("transformer.step")
    helpers.stop(ranks[1].pid)
    faults.clear("transformer.step")
    assert handle.result(SURE).data == video(4)
    wait_until(lambda: not lives(ranks[1].pid), "the stopped rank lives on")


def test_a_rank_that_dies_while_idle_is_replaced(pipeline: Pipeline, video: Any) -> None:
    before = gang(pipeline)
    os.kill(before.ranks[1].pid, signal.SIGKILL)
    wait_until(lambda: gang(pipeline).pid != before.pid, "the gang is not replaced")
    assert pipeline.generate(ask("after")).data == video(4)


def test_all_ranks_stop_at_a_cancelled_step_and_go_on(pipeline: Pipeline, faults: Faults, video: Any) -> None:
    before = gang(pipeline)
    faults.set("transformer.step", "wait")
    handle = pipeline.submit(ask("cancelled", steps=100))
    faults.await_arrival("transformer.step")
    handle.cancel()
    faults.clear("transformer.step")
    with pytest.raises(Cancelled):
        handle.result(SURE)
    assert pipeline.generate(ask("next")).data == video(4)
    assert gang(pipeline) == before


def test_requests_outlive_random_kills_of_ranks(pipeline: Pipeline, faults: Faults, video: Any) -> None:
    dice, before = random.Random(7), pipeline.num_restarts["transformer"]
    handles = [pipeline.submit(ask(f"storm-{number}")) for number in range(12)]
    for strike in range(1, 3):
        faults.set("transformer.step", "wait")
        faults.await_arrival("transformer.step")
        os.kill(dice.choice(gang(pipeline).ranks).pid, signal.SIGKILL)
        faults.clear("transformer.step")
        wait_until(lambda least=strike: pipeline.num_restarts["transformer"] >= before + least, "no new gang")
    assert {handle.result(SURE).data for handle in handles} == {video(4)}
