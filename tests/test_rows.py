"""A decoder whose rows are shared by ranks: gloo on CPUs, equal threads, tiny VAEs in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gang_processes import Run, gangs

from disagg_ray.config.options import VaeConfig
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.errors import RequestError
from disagg_ray.models.parallel.ranks import Ranks
from disagg_ray.models.parallel.rows import split_rows
from disagg_ray.models.tuning import tune_vae
from disagg_ray.models.wan.random import build_component
from disagg_ray.models.wan.shapes import get_shape

Size = tuple[int, int, int]


@pytest.fixture(scope="module")
def run_ranks() -> Iterator[Run]:
    with gangs() as run:
        yield run


def decode(ranks: Ranks | None, shape: str, sizes: list[Size], options: VaeConfig, dtype: str) -> list[torch.Tensor]:
    """Return the frames of latents of these sizes (frames, height, width)."""
    vae = build_component(get_shape(shape), "vae", dtype, "cpu")
    tune_vae(vae, options)
    if ranks is not None:
        split_rows(vae, ranks)
    channels, generator = vae.config.z_dim, torch.Generator().manual_seed(1)
    with torch.inference_mode():
        drawn = (torch.randn(1, channels, *size, generator=generator).to(vae.dtype) for size in sizes)
        return [vae.decode(latents).sample for latents in drawn]


def difference(
    run_ranks: Run, shape: str, num_ranks: int, sizes: list[Size], options: VaeConfig, dtype: str = "float32"
) -> float:
    """Return the largest difference of rank 0's frames to those of one process; the others must have none."""
    made, *others = run_ranks(decode, ParallelConfig(rows=num_ranks), shape, sizes, options, dtype)
    assert not any(frames.numel() for rank in others for frames in rank)
    one = decode(None, shape, sizes, options, dtype)
    return max(float((a - b).abs().max()) for a, b in zip(made, one, strict=True))


LARGE = [(2, 30, 52), (3, 31, 52)]
"""Latents so large that torch picks the same kernels for a share of the rows as for all; the second ones' differ."""


@pytest.mark.parametrize(
    ("shape", "num_ranks"),
    [
        pytest.param("tiny-t2v", 2, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.proof) for case in [("tiny-t2v", 4), ("tiny-ti2v", 3)]),
    ],
)
def test_ranks_decode_the_frames_of_one_process(run_ranks: Run, shape: str, num_ranks: int, one_thread: None) -> None:
    assert difference(run_ranks, shape, num_ranks, LARGE, VaeConfig()) == 0


@pytest.mark.proof
@pytest.mark.parametrize(
    ("options", "dtype", "most"),
    [
        (VaeConfig(channels_last=True), "float32", 1e-5),
        (VaeConfig(compile=True), "float32", 1e-5),
        (VaeConfig(), "bfloat16", 0.02),
        (VaeConfig(), "float16", 0.002),
    ],
)
def test_options_of_the_vae_go_with_rows(
    run_ranks: Run, options: VaeConfig, dtype: str, most: float, one_thread: None
) -> None:
    assert difference(run_ranks, "tiny-t2v", 2, [(2, 9, 12)], options, dtype) <= most


@pytest.mark.proof
def test_latents_so_small_that_torch_picks_other_kernels_differ_by_rounding(run_ranks: Run, one_thread: None) -> None:
    assert 0 < difference(run_ranks, "tiny-t2v", 4, [(2, 16, 16)], VaeConfig()) < 2e-5


def refuse(ranks: Ranks) -> str:
    with pytest.raises(RequestError) as refused:
        decode(ranks, "tiny-t2v", [(2, 1, 8)], VaeConfig(), "float32")
    return str(refused.value)


@pytest.mark.proof
def test_fewer_rows_than_ranks_are_refused_with_the_numbers(run_ranks: Run) -> None:
    words = "this height has 1 rows of latents, which is fewer than the 2 ranks"
    assert all(refused.startswith(words) for refused in run_ranks(refuse, ParallelConfig(rows=2)))
