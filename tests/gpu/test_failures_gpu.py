"""A process in which CUDA has failed for good ends, and what it was to compute is computed elsewhere."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import psutil
import pytest
import torch
from faulty import faulty_replicas

from disagg_ray import Pipeline, Request

STAGES = ("encoder", "transformer", "decoder")
SHARES = tuple(f"stages.{stage}.num_gpus=0.2" for stage in STAGES)
REQUEST = Request(prompt="a red circle", height=48, width=80, num_frames=5, num_inference_steps=4, seed=7, format="npy")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
wait_until = partial(helpers.wait_until, timeout_s=120.0)


def test_a_device_side_assert_ends_the_process_and_costs_no_video(cluster: None, tmp_path: Path) -> None:
    overrides = [*SHARES, "stages.transformer.replicas=2"]
    with faulty_replicas(tmp_path) as faults, Pipeline.from_config("conf/tiny_t2v.yaml", *overrides) as pipeline:
        expected = pipeline.generate(REQUEST).frames
        before = {replica.pid for replica in pipeline.replicas if replica.stage == "transformer"}
        faults.set("transformer.compute", "assert")
        results = list(pipeline.generate_all(replace(REQUEST, id=f"r{number}") for number in range(6)))
        assert all(np.array_equal(result.frames, expected) for result in results)
        wait_until(lambda: pipeline.num_restarts["transformer"] == 1, "no replica was replaced")
        after = {replica.pid for replica in pipeline.replicas if replica.stage == "transformer"}
        (ended,) = before - after
        wait_until(lambda: not psutil.pid_exists(ended), "the process lives on")
