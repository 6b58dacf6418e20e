"""Gangs through Ray as people run them: every kind of request, and a service whose supervisor dies."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import psutil
import pytest
from gang_videos import CPU, difference
from ray.util import placement_group_table
from safetensors.torch import save_file
from test_lora import TO_Q, factors

from disagg_ray import LocalPipeline, Request, cli, connect
from disagg_ray.driver.names import find_replicas, services

pytestmark = pytest.mark.proof

CONF = Path(__file__).parent.parent / "conf"
T = "stages.transformer"
ONE_THREAD = f"{T}.num_threads=1"
SIZE: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3, "seed": 5, "format": "npy"}

wait_until = partial(helpers.wait_until, timeout_s=240.0)


@pytest.mark.parametrize(
    ("task", "parallel"),
    [
        ("i2v", "{ulysses: 2}"),
        ("a14b_i2v", "{cfg: 2, ulysses: 2}"),
        ("ti2v", "{ulysses: 2}"),
    ],
)
def test_mixed_requests_equal_those_of_one_process(cluster: None, task: str, parallel: str) -> None:
    assert difference(CPU, task, parallel) == 0


@pytest.mark.parametrize("parallel", ["{cfg: 2}", "{ulysses: 2, shard_weights: true}"])
def test_so_they_do_with_a_lora(cluster: None, tmp_path: Path, parallel: str) -> None:
    save_file(factors(TO_Q), tmp_path / "lora.safetensors")
    loras = f"{T}.denoiser.loras=[{{path: {tmp_path / 'lora.safetensors'}}}]"
    assert difference(CPU, "a14b_t2v", parallel, loras) == 0


@pytest.mark.parametrize("parallel", ["{cfg: 2}", "{ulysses: 2, shard_weights: true}"])
def test_so_they_do_compiled(cluster: None, parallel: str) -> None:
    assert difference(CPU, "t2v", parallel, f"{T}.denoiser.compile=default") == 0


def test_a_service_of_gangs_is_adopted_changed_and_taken_down(cluster: None) -> None:
    name, config = "gangs", str(CONF / "tiny_t2v.yaml")
    request = Request("a red circle", num_frames=5, **SIZE)
    frames = LocalPipeline.from_config(config, ONE_THREAD).generate(request).frames
    assert cli.main(["up", name, "--config", config, f"{T}.parallel.ulysses=2", ONE_THREAD]) == 0
    pids = set()
    with connect(name) as connection:
        before = connection.snapshot()
        os.kill(before.pid, signal.SIGKILL)
        assert np.array_equal(connection.generate(request).frames, frames)
        assert ranks_of(connection.replicas) == ranks_of(before.replicas)
        pids |= {before.pid, *ranks_of(before.replicas)}
        assert cli.main(["up", name, "--config", config, f"{T}.parallel.cfg=2", ONE_THREAD]) == 0
        wait_until(lambda: ranks_of(connection.replicas).isdisjoint(ranks_of(before.replicas)), "not changed")
        assert np.array_equal(connection.generate(request).frames, frames)
        pids |= {connection.snapshot().pid, *ranks_of(connection.replicas)}
    assert cli.main(["down", name]) == 0
    assert (services(), find_replicas(name)) == ([], [])
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "processes are left")
    wait_until(lambda: all(group["state"] == "REMOVED" for group in bundles().values()), "bundles are left")


def ranks_of(replicas: Any) -> set[int]:
    """Return the processes of all gangs."""
    return {rank.pid for replica in replicas for rank in replica.ranks}


def bundles() -> dict[str, Any]:
    table: dict[str, Any] = placement_group_table()
    return table
