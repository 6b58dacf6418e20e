"""A stage's models over several processes: gloo on CPUs, equal threads, tiny checkpoints in float32."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from gang_processes import Run, asked, gangs, generate, load
from helpers import connect_stages

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.config.schema import Config
from disagg_ray.errors import DisaggError
from disagg_ray.models.parallel.ranks import Ranks, layout_of
from disagg_ray.models.wan.shapes import get_shape


@pytest.fixture(scope="module")
def run_ranks() -> Iterator[Run]:
    with gangs() as run:
        yield run


def talk(ranks: Ranks) -> Any:
    sent = {
        "halves": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
        "image": torch.tensor([[3]], dtype=torch.uint8),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }
    tensors = ranks.share(layout_of(sent), sent if ranks.rank == 0 else None)
    plain = {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()}
    branches = ranks.gather_branches(torch.tensor([float(ranks.branch)]))
    return plain, ranks.agree(ranks.rank == 0), ranks.agree(ranks.rank != 0), torch.cat(branches).tolist()


@pytest.mark.slow
def test_ranks_share_what_the_first_one_has_and_follow_its_word(run_ranks: Run) -> None:
    first, *others = run_ranks(talk, ParallelConfig(cfg=2))
    tensors, go, stop, branches = first
    assert tensors["halves"] == (torch.bfloat16, [[0, 3], [1, 4], [2, 5]])
    assert tensors["one"] == (torch.float32, 2.5) and tensors["none"][1] == []
    assert (go, stop, branches) == (True, False, [0.0, 1.0])
    assert others == [first]


BOTH = "{cfg: 2, ulysses: 2}"
PROOF_TASKS = [
    pytest.param(task, BOTH, marks=pytest.mark.proof) for task in ("t2v", "i2v", "flf2v", "a14b_t2v", "a14b_i2v")
]


def make_stock(task: str, folder: Path, many: list[dict[str, Any]], length: int) -> list[Any]:
    """Return the frames of the stock pipeline."""
    shape = get_shape(f"tiny-{task.replace('_', '-')}")
    stock = getattr(diffusers, shape.pipeline).from_pretrained(folder, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    frames = []
    for arguments in many:
        given = dict(arguments)
        generator = torch.Generator("cpu").manual_seed(given.pop("seed"))
        frames.append(stock(**given, generator=generator, max_sequence_length=length).frames[0])
    return frames


@pytest.mark.parametrize(("task", "parallel"), [pytest.param("t2v", "{cfg: 2}", marks=pytest.mark.slow), *PROOF_TASKS])
def test_ranks_make_the_frames_of_stock(
    run_ranks: Run, task: str, parallel: str, checkpoint: Callable[[str], Path], one_thread: None
) -> None:
    folder = checkpoint(f"tiny-{task.replace('_', '-')}")
    config = load(task, folder, f"stages.transformer.parallel={parallel}", "stages.transformer.num_threads=1")
    many = [asked(task), asked(task, height=32, width=32, num_frames=13, guidance_scale=1.0, num_inference_steps=2)]
    made = run_ranks(generate, config.stages["transformer"].parallel, config, many)
    for rank in made:
        for ours, stock in zip(rank, make_stock(task, folder, many, config.model.max_sequence_length), strict=True):
            assert np.abs(ours - stock).max() == 0


DENOISER = "stages.transformer.denoiser"
OPTIONS = {
    BOTH: (
        (f"{DENOISER}.step_cache={{method: mag, ratios: [1, 1, 1, 1, 1, 1]}}",),
        (f"{DENOISER}.step_cache={{method: taylorseer, interval: 2}}",),
        (f"{DENOISER}.quantization=fp8_storage",),
        (f"{DENOISER}.attention=auto",),
    ),
    "{cfg: 2}": (
        (f"{DENOISER}.step_cache={{method: first_block, threshold: 10}}",),
        (f"{DENOISER}.step_cache={{method: sea, threshold: 0.5}}",),
    ),
    "{ulysses: 2, shard_weights: true}": (("model.dtype.transformer=bfloat16",),),
}
"""Options that change what is computed from step to step or how, by the ranks for which they are proved."""


def generate_each(ranks: Ranks | None, configs: list[Config], many: list[dict[str, Any]]) -> list[Any]:
    return [frames for config in configs for frames in generate(ranks, config, many)]


@pytest.mark.proof
@pytest.mark.parametrize(("task", "parallel"), [(task, ranks) for task in ("t2v", "a14b_t2v") for ranks in OPTIONS])
def test_ranks_take_every_decision_as_one_process_does(
    run_ranks: Run, task: str, parallel: str, checkpoint: Callable[[str], Path], one_thread: None
) -> None:
    folder = checkpoint(f"tiny-{task.replace('_', '-')}")
    ranks = (f"stages.transformer.parallel={parallel}", "stages.transformer.num_threads=1")
    configs = [load(task, folder, *ranks, *options) for options in OPTIONS[parallel]]
    many = [asked(task, num_inference_steps=6), asked(task, guidance_scale=1.0, num_inference_steps=6)]
    expected = generate_each(None, configs, many)
    for rank in run_ranks(generate_each, configs[0].stages["transformer"].parallel, configs, many):
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(rank, expected, strict=True))


def weigh(ranks: Ranks, config: Config) -> float:
    """Return how much of its transformer's weights a rank keeps."""
    stage = connect_stages(config)["transformer"]
    stage.load(ranks)
    weights = list(stage.component("transformer").parameters())
    kept = sum(weight.to_local().nbytes if hasattr(weight, "to_local") else weight.nbytes for weight in weights)
    return kept / sum(weight.nbytes for weight in weights)


@pytest.mark.proof
@pytest.mark.parametrize("task", ["t2v", "a14b_t2v"])
def test_ranks_that_share_weights_make_the_frames_of_stock(
    run_ranks: Run, task: str, checkpoint: Callable[[str], Path], one_thread: None
) -> None:
    folder = checkpoint(f"tiny-{task.replace('_', '-')}")
    parallel = "{cfg: 2, ulysses: 2, shard_weights: true}"
    config = load(task, folder, f"stages.transformer.parallel={parallel}", "stages.transformer.num_threads=1")
    many = [asked(task), asked(task, guidance_scale=1.0, num_inference_steps=2)]
    stock = make_stock(task, folder, many, config.model.max_sequence_length)
    for rank in run_ranks(generate, config.stages["transformer"].parallel, config, many):
        assert all(np.abs(ours - theirs).max() == 0 for ours, theirs in zip(rank, stock, strict=True))


@pytest.mark.slow
def test_a_rank_that_shares_weights_keeps_its_part_of_the_blocks(
    run_ranks: Run, checkpoint: Callable[[str], Path]
) -> None:
    config = load("t2v", checkpoint("tiny-t2v"), "stages.transformer.parallel={cfg: 2, shard_weights: true}")
    assert all(kept < 0.75 for kept in run_ranks(weigh, config.stages["transformer"].parallel, config))


def refuse(ranks: Ranks, config: Config, many: list[dict[str, Any]]) -> str:
    with pytest.raises(DisaggError) as refused:
        generate(ranks, config, many)
    return str(refused.value)


@pytest.mark.proof
def test_heads_that_do_not_divide_are_refused_with_the_numbers(
    run_ranks: Run, checkpoint: Callable[[str], Path]
) -> None:
    config = load("t2v", checkpoint("tiny-t2v"), "stages.transformer.parallel.ulysses=3", "defaults.height=48")
    refused = run_ranks(refuse, config.stages["transformer"].parallel, config, [asked("t2v")])
    message = "invalid stages.transformer.parallel.ulysses=3: must divide the 2 attention heads of this model; write"
    assert all(message in words for words in refused)
