"""A decoder of several ranks through Ray: the same video, a rank that dies while it decodes, and a cancel."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import Faults, faulty_replicas
from test_gang_faults import SURE, gang, lives, living_bundles, wait_until

from disagg_ray import Cancelled, LocalPipeline, Pipeline, Request

pytestmark = pytest.mark.proof

T2V = Path(__file__).parent.parent / "conf/tiny_t2v.yaml"
ROWS = ("stages.decoder.parallel.rows=2", "stages.decoder.num_threads=1")
SMALL = 2e-5
"""Of 1; torch picks other kernels for shares as small as a tiny model's."""
SIZES = ((32, 48, 5), (48, 32, 9), (64, 64, 5))


def differs(made: Any, one: Any) -> float:
    return float(np.abs(made - one).max())


def ask(name: str, size: tuple[int, int, int] = SIZES[0]) -> Request:
    height, width, num_frames = size
    return Request(
        "a red circle", seed=5, height=height, width=width, num_frames=num_frames, num_inference_steps=2, id=name,
        format="npy",
    )  # fmt: skip


@pytest.fixture(scope="module")
def local() -> LocalPipeline:
    return LocalPipeline.from_config(T2V)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with faulty_replicas(tmp_path_factory.mktemp("faults")) as faults:
        yield faults


@pytest.fixture(scope="module")
def pipeline(cluster: None, faults: Faults) -> Iterator[Pipeline]:
    with Pipeline.from_config(T2V, *ROWS, "failures.stall_s=60", "failures.max_attempts=4") as pipeline:
        yield pipeline
    wait_until(lambda: living_bundles() == 0, "bundles are left")


def test_mixed_sizes_are_the_videos_of_one_process(pipeline: Pipeline, local: LocalPipeline) -> None:
    requests = [ask(f"size-{number}", size) for number, size in enumerate(SIZES)]
    for made, request in zip(pipeline.generate_all(requests), requests, strict=True):
        frames = local.generate(request).frames
        assert made.frames.shape == frames.shape
        assert differs(made.frames, frames) <= SMALL


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_in_a_decode_is_replaced_and_the_video_is_the_same(
    pipeline: Pipeline, local: LocalPipeline, faults: Faults, rank: int
) -> None:
    before = gang(pipeline).ranks
    faults.set("decoder.compute", "wait")
    handle = pipeline.submit(ask(f"killed-{rank}"))
    faults.await_arrival("decoder.compute")
    os.kill(before[rank].pid, signal.SIGKILL)
    faults.clear("decoder.compute")
    assert differs(handle.result(SURE).frames, local.generate(ask("local")).frames) <= SMALL
    assert faults.times_computed(f"killed-{rank}")["transformer"] == 1
    wait_until(lambda: not any(lives(rank.pid) for rank in before), "a rank of the lost gang lives on")
    wait_until(lambda: living_bundles() == 1, "bundles are left")


def test_a_cancelled_decode_leaves_its_gang_at_work(pipeline: Pipeline, local: LocalPipeline, faults: Faults) -> None:
    before = gang(pipeline)
    faults.set("decoder.compute", "wait")
    handle = pipeline.submit(ask("cancelled"))
    faults.await_arrival("decoder.compute")
    handle.cancel()
    faults.clear("decoder.compute")
    with pytest.raises(Cancelled):
        handle.result(SURE)
    assert differs(pipeline.generate(ask("next")).frames, local.generate(ask("local")).frames) <= SMALL
    assert gang(pipeline) == before
    wait_until(lambda: not any(h.bytes_in_use for h in pipeline.health().values()), "a pool keeps slots")
