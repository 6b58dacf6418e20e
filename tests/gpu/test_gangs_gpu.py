"""Ranks on GPUs of their own, over NCCL: the frames of one GPU, and nothing left of ranks that died.

`pytest -p no:skipping -o addopts= tests/gpu/test_gangs_gpu.py` runs the same on CPUs, without what needs a GPU.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import gang_videos
import helpers
import numpy as np
import psutil
import pytest
import torch
from faulty import Faults, faulty_replicas
from gang_videos import CONF, CPU, GPU, SURE, T
from safetensors.torch import save_file
from test_lora import factors
from test_speed_gpu import SHAPES

from disagg_ray import Cancelled, LocalPipeline, Pipeline, Request
from disagg_ray.models.random import make_checkpoint
from disagg_ray.models.wan import shapes
from disagg_ray.replica.messages import ReplicaInfo

PLACE = GPU if torch.cuda.is_available() else CPU
BF16 = "model.dtype.transformer=bfloat16"
ULYSSES, CFG, BOTH = "{ulysses: 2}", "{cfg: 2}", "{cfg: 2, ulysses: 2}"
SHARDED = "{ulysses: 2, shard_weights: true}"
ROUNDED = {ULYSSES: 1e-3, SHARDED: 1e-3, BOTH: 1e-3} if PLACE is GPU else {}
"""How far frames (0 to 1) may be: on a GPU, other kernels suit the fewer tokens of tiny models; with cfg alone, 0."""
HALF = 50.0
"""What bfloat16 allows more."""
SLACK = 256 * 2**20
"""Bytes of GPU memory; a process that only has a CUDA context holds more."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
four_gpus = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices")
needs_flash_4 = pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash-attn-4")
wait_until = partial(helpers.wait_until, timeout_s=SURE)
difference = partial(gang_videos.difference, PLACE)


@pytest.mark.parametrize("parallel", [ULYSSES, CFG, SHARDED, pytest.param(BOTH, marks=four_gpus)])
@pytest.mark.parametrize("task", ["t2v", "i2v", "ti2v", "a14b_t2v"])
def test_a_gang_makes_the_frames_of_one_gpu(cluster: None, task: str, parallel: str) -> None:
    assert difference(task, parallel) <= ROUNDED.get(parallel, 0)


@pytest.mark.parametrize("parallel", [ULYSSES, CFG, SHARDED])
def test_so_it_does_in_bfloat16(cluster: None, parallel: str) -> None:
    assert difference("t2v", parallel, BF16) <= HALF * ROUNDED.get(parallel, 0)


@pytest.mark.parametrize("parallel", [ULYSSES, CFG, SHARDED])
def test_so_it_does_compiled(cluster: None, parallel: str) -> None:
    made = difference("t2v", parallel, BF16, f"{T}.denoiser.compile=default")
    assert made <= HALF * ROUNDED.get(parallel, 0)


@pytest.mark.parametrize("parallel", [ULYSSES, CFG, SHARDED])
def test_so_it_does_with_a_lora(cluster: None, tmp_path: Path, parallel: str) -> None:
    save_file(factors("transformer.blocks.0.attn1.to_q", width=48), tmp_path / "lora.safetensors")
    loras = f"{T}.denoiser.loras=[{{path: {tmp_path / 'lora.safetensors'}}}]"
    assert difference("a14b_t2v", parallel, loras) <= ROUNDED.get(parallel, 0)


@pytest.mark.parametrize(
    "backend", ["native", "_native_cudnn", "_native_flash", pytest.param("flash_4", marks=needs_flash_4)]
)
def test_so_it_does_with_an_attention_backend(
    cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str
) -> None:
    wide = shapes.replace(shapes.get_shape("tiny-t2v"), name="wide-heads", transformer=SHAPES["tiny-t2v"])
    monkeypatch.setitem(shapes.SHAPES, wide.name, wide)
    folder = make_checkpoint(wide.name, tmp_path / "checkpoint")
    options = (f"model.path={folder}", BF16, f"{T}.denoiser.attention={backend}")
    assert difference("t2v", ULYSSES, *options) <= HALF * ROUNDED.get(ULYSSES, 0)


def ask(name: str, steps: int = 4) -> Request:
    size = {"height": 32, "width": 32, "num_frames": 5}
    return Request("a red circle", seed=5, num_inference_steps=steps, format="npy", id=name, **size)


def used() -> list[int]:
    """Return the bytes that are taken on each GPU, by any process."""
    pairs = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
    return [total - free for free, total in pairs]


def no_more_than(before: list[int]) -> bool:
    return all(now <= then + SLACK for now, then in zip(used(), before, strict=True))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    with faulty_replicas(tmp_path_factory.mktemp("faults")) as faults:
        yield faults


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Give one GPU's."""
    with LocalPipeline.from_config(CONF / "tiny_t2v.yaml", *PLACE.one) as local:
        made = local.generate(ask("local")).frames
    assert made is not None
    return made


@pytest.fixture(scope="module")
def pipeline(cluster: None, faults: Faults, frames: np.ndarray) -> Iterator[Pipeline]:
    """Give a pipeline with a gang of two; once it is closed, the memory of the GPUs is as before."""
    before = used()
    given = (*PLACE.gang, f"{T}.parallel.ulysses=2", "failures.stall_s=30", "failures.max_attempts=4")
    with Pipeline.from_config(CONF / "tiny_t2v.yaml", *given) as pipeline:
        pipeline.generate(ask("first"))
        yield pipeline
    wait_until(lambda: no_more_than(before), f"GPU memory is left: {used()} after {before}")


def assert_equal(made: np.ndarray | None, frames: np.ndarray) -> None:
    assert made is not None
    assert np.abs(made - frames).max() <= ROUNDED.get(ULYSSES, 0)


def gang(pipeline: Pipeline) -> ReplicaInfo:
    wait_until(lambda: any(replica.ranks for replica in pipeline.replicas), "no gang serves")
    return next(replica for replica in pipeline.replicas if replica.ranks)


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def strike(pipeline: Pipeline, faults: Faults, frames: np.ndarray, rank: int, sign: signal.Signals) -> None:
    """Signal a rank in mid-step; its request is done again, and nothing is left of its gang."""
    ranks, before = gang(pipeline).ranks, used()
    faults.set("transformer.step", "wait")
    handle = pipeline.submit(ask(f"{sign.name}-{rank}"))
    faults.await_arrival("transformer.step")
    os.kill(ranks[rank].pid, sign)
    faults.clear("transformer.step")
    assert_equal(handle.result(SURE).frames, frames)
    wait_until(lambda: not any(lives(lost.pid) for lost in ranks), "a rank of the lost gang lives on")
    wait_until(lambda: no_more_than(before), f"GPU memory of the lost gang is left: {used()} after {before}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_in_mid_step_costs_neither_video_nor_memory(
    pipeline: Pipeline, faults: Faults, frames: np.ndarray, rank: int
) -> None:
    strike(pipeline, faults, frames, rank, signal.SIGKILL)


def test_a_rank_that_stops_in_mid_step_frees_its_gpu(pipeline: Pipeline, faults: Faults, frames: np.ndarray) -> None:
    """The other one waits for it in NCCL."""
    strike(pipeline, faults, frames, 1, signal.SIGSTOP)


def test_all_ranks_stop_at_a_cancelled_step(pipeline: Pipeline, faults: Faults, frames: np.ndarray) -> None:
    before = gang(pipeline)
    faults.set("transformer.step", "wait")
    handle = pipeline.submit(ask("cancelled", steps=100))
    faults.await_arrival("transformer.step")
    handle.cancel()
    faults.clear("transformer.step")
    with pytest.raises(Cancelled):
        handle.result(SURE)
    assert_equal(pipeline.generate(ask("next")).frames, frames)
    assert gang(pipeline) == before
