"""Ranks on GPUs of their own, over NCCL: the frames of one GPU, and nothing left of ranks that died.

`pytest -p no:skipping -o addopts= tests/gpu/test_gangs_gpu.py` runs the same on CPUs, without what needs a GPU. Each
test prints its seconds, and how far its frames were from those of one GPU.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import helpers
import numpy as np
import psutil
import pytest
import torch
from faulty import Faults, faulty_replicas
from gang_processes import Run, asked, gangs, generate, load
from gang_videos import CONF, CPU, GPU, SURE, T
from safetensors.torch import save_file
from test_lora import factors
from test_speed_gpu import SHAPES

from disagg_ray import Cancelled, LocalPipeline, Pipeline, Request
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.models.random import make_checkpoint
from disagg_ray.models.wan import shapes
from disagg_ray.replica.messages import ReplicaInfo

PLACE = GPU if torch.cuda.is_available() else CPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = "model.dtype.transformer=bfloat16"
ULYSSES, CFG, BOTH = "{ulysses: 2}", "{cfg: 2}", "{cfg: 2, ulysses: 2}"
SHARDED = "{ulysses: 2, shard_weights: true}"
ROUNDED = {ULYSSES: 3e-3, SHARDED: 3e-3, BOTH: 3e-3} if DEVICE == "cuda" else {}
"""How far frames (0 to 1) may be: on a GPU, other kernels suit the fewer tokens of tiny models; with cfg alone, 0."""
HALF = 20.0
"""What bfloat16 allows more."""
FLASH_4 = ["flash_4"] if find_spec("flash_attn") is not None else []
BACKENDS = ["_native_cudnn", "_native_flash", *FLASH_4] if DEVICE == "cuda" else ["native"]
SLACK = 256 * 2**20
"""Bytes of GPU memory; a process that only has a CUDA context holds more."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
four_gpus = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices")
wait_until = partial(helpers.wait_until, timeout_s=SURE)

Say = Callable[[str], None]
Differ = Callable[..., float]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Give a print that shows whether or not a test fails."""

    def show(words: str) -> None:
        with capsys.disabled():
            print(f" {words}", end=" ", flush=True)

    return show


@pytest.fixture(autouse=True)
def seconds(say: Say) -> Iterator[None]:
    began = time.monotonic()
    yield
    say(f"{time.monotonic() - began:.1f} s")


@pytest.fixture(scope="module")
def run_ranks() -> Iterator[Run]:
    with gangs(DEVICE) as run:
        yield run


@pytest.fixture
def difference(run_ranks: Run, checkpoint: Callable[[str], Path], say: Say) -> Differ:
    """Give a function that returns how far a gang's frames are from those of one process at most, in two sizes."""

    def differ(task: str, ranks: str, *options: str, folder: Path | None = None) -> float:
        size = {"height": 64, "width": 96} if task == "ti2v" else {}
        many = [asked(task, **size), asked(task, **size, num_frames=9, guidance_scale=1.0)]
        folder = folder or checkpoint(f"tiny-{task.replace('_', '-')}")
        devices = [f"stages.{name}.device={DEVICE}" for name in ("encoder", "transformer", "decoder")]
        places = (*devices, f"{T}.num_gpus={int(DEVICE == 'cuda')}", f"{T}.num_threads=1")
        alone, gang = (load(task, folder, *places, *more, *options) for more in ((), (f"{T}.parallel={ranks}",)))
        (expected,) = run_ranks(generate, ParallelConfig(), alone, many)
        made, *_ = run_ranks(generate, gang.stages["transformer"].parallel, gang, many)
        far = max(float(np.abs(ours - one).max()) for ours, one in zip(made, expected, strict=True))
        say(f"max difference {far:.2e},")
        return far

    return differ


@pytest.mark.parametrize(
    ("task", "ranks"),
    [
        ("t2v", ULYSSES),
        ("t2v", CFG),
        ("t2v", SHARDED),
        ("i2v", ULYSSES),
        ("ti2v", ULYSSES),
        ("a14b_t2v", CFG),
        ("a14b_t2v", SHARDED),
        pytest.param("a14b_t2v", BOTH, marks=four_gpus),
    ],
)
def test_a_gang_makes_the_frames_of_one_gpu(difference: Differ, task: str, ranks: str) -> None:
    assert difference(task, ranks) <= ROUNDED.get(ranks, 0)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (CFG, ()),
        (ULYSSES, (f"{T}.denoiser.compile=default",)),
        (SHARDED, (f"{T}.denoiser.compile=default",)),
        (ULYSSES, (f"{T}.denoiser.step_cache={{method: taylorseer, interval: 2}}",)),
        (ULYSSES, (f"{T}.denoiser.quantization=fp8_storage",)),
        (ULYSSES, (f"{T}.denoiser.attention=auto",)),
    ],
)
def test_so_it_does_in_bfloat16_with_options(difference: Differ, ranks: str, options: tuple[str, ...]) -> None:
    assert difference("t2v", ranks, BF16, *options) <= HALF * ROUNDED.get(ranks, 0)


@pytest.mark.parametrize("ranks", [CFG, SHARDED])
def test_so_it_does_with_a_lora(difference: Differ, tmp_path: Path, ranks: str) -> None:
    save_file(factors("transformer.blocks.0.attn1.to_q", width=48), tmp_path / "lora.safetensors")
    loras = f"{T}.denoiser.loras=[{{path: {tmp_path / 'lora.safetensors'}}}]"
    assert difference("a14b_t2v", ranks, loras) <= ROUNDED.get(ranks, 0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a checkpoint with heads as wide as kernels want them."""
    shape = shapes.replace(shapes.get_shape("tiny-t2v"), name="wide-heads", transformer=SHAPES["tiny-t2v"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, shape.name, shape)
        yield make_checkpoint(shape.name, tmp_path_factory.mktemp("wide") / "checkpoint")


@pytest.mark.parametrize("backend", BACKENDS)
def test_so_it_does_with_an_attention_backend(difference: Differ, wide: Path, backend: str) -> None:
    made = difference("t2v", ULYSSES, BF16, f"{T}.denoiser.attention={backend}", folder=wide)
    assert made <= HALF * ROUNDED.get(ULYSSES, 0)


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
    given = (*PLACE.gang, f"{T}.parallel.ulysses=2", "failures.stall_s=15", "failures.max_attempts=4")
    with Pipeline.from_config(CONF / "tiny_t2v.yaml", *given) as pipeline:
        pipeline.generate(ask("first"))
        yield pipeline
    wait_until(lambda: no_more_than(before), f"GPU memory is left: {used()} after {before}")


@pytest.fixture
def assert_same(frames: np.ndarray, say: Say) -> Callable[[np.ndarray | None], None]:
    def check(made: np.ndarray | None) -> None:
        assert made is not None
        far = float(np.abs(made - frames).max())
        say(f"max difference {far:.2e},")
        assert far <= ROUNDED.get(ULYSSES, 0)

    return check


def gang(pipeline: Pipeline) -> ReplicaInfo:
    wait_until(lambda: any(replica.ranks for replica in pipeline.replicas), "no gang serves")
    return next(replica for replica in pipeline.replicas if replica.ranks)


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_all_ranks_stop_at_a_cancelled_step(
    pipeline: Pipeline, faults: Faults, assert_same: Callable[[np.ndarray | None], None]
) -> None:
    before = gang(pipeline)
    faults.set("transformer.step", "wait")
    handle = pipeline.submit(ask("cancelled", steps=100))
    faults.await_arrival("transformer.step")
    handle.cancel()
    faults.clear("transformer.step")
    with pytest.raises(Cancelled):
        handle.result(SURE)
    assert_same(pipeline.generate(ask("next")).frames)
    assert gang(pipeline) == before


@pytest.mark.parametrize(
    ("rank", "point", "sign"),
    [
        (0, "pull", signal.SIGKILL),
        (1, "step", signal.SIGKILL),
        (0, "publish", signal.SIGKILL),
        (1, "step", signal.SIGSTOP),  # rank 0 waits for it in NCCL
    ],
)
def test_a_rank_that_is_struck_costs_neither_video_nor_memory(
    pipeline: Pipeline,
    faults: Faults,
    assert_same: Callable[[np.ndarray | None], None],
    rank: int,
    point: str,
    sign: signal.Signals,
) -> None:
    ranks, before = gang(pipeline).ranks, used()
    faults.set(f"transformer.{point}", "wait")
    handle = pipeline.submit(ask(f"{sign.name}-{rank}-{point}"))
    faults.await_arrival(f"transformer.{point}")
    os.kill(ranks[rank].pid, sign)
    faults.clear(f"transformer.{point}")
    assert_same(handle.result(SURE).frames)
    wait_until(lambda: not any(lives(lost.pid) for lost in ranks), "a rank of the lost gang lives on")
    wait_until(lambda: no_more_than(before), f"GPU memory of the lost gang is left: {used()} after {before}")
