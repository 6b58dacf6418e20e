"""A stage's models over several processes: gloo on CPUs, equal threads, tiny checkpoints in float32."""

from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from helpers import free_port

from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.models.parallel.ranks import Ranks

TIMEOUT_S = 120.0


def run_ranks(work: Callable[..., Any], parallel: ParallelConfig, *args: Any) -> list[Any]:
    """Return what `work(ranks, *args)` returns in each rank's process, in their order."""
    address = f"127.0.0.1:{free_port()}"
    context = mp.get_context("spawn")
    with context.Pool(parallel.size) as pool:
        jobs = [pool.apply_async(_join_and, (work, rank, address, parallel, args)) for rank in range(parallel.size)]
        return [job.get(timeout=TIMEOUT_S) for job in jobs]


def _join_and(work: Callable[..., Any], rank: int, address: str, parallel: ParallelConfig, args: Any) -> Any:
    torch.set_num_threads(1)
    ranks = Ranks.join(rank, address, parallel, "cpu", TIMEOUT_S)
    try:
        return work(ranks, *args)
    finally:
        ranks.leave()


def talk(ranks: Ranks) -> Any:
    sent = {
        "halves": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
        "image": torch.tensor([[3]], dtype=torch.uint8),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }
    value, tensors = ranks.share("a cat", sent) if ranks.rank == 0 else ranks.share(None, None)
    plain = {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()}
    branches = ranks.gather_branches(torch.tensor([float(ranks.branch)]))
    return value, plain, ranks.agree(ranks.rank == 0), ranks.agree(ranks.rank != 0), torch.cat(branches).tolist()


def test_ranks_share_what_the_first_one_has_and_follow_its_word() -> None:
    first, *others = run_ranks(talk, ParallelConfig(cfg=2))
    value, tensors, go, stop, branches = first
    assert value == "a cat" and tensors["halves"] == (torch.bfloat16, [[0, 3], [1, 4], [2, 5]])
    assert tensors["one"] == (torch.float32, 2.5) and tensors["none"][1] == []
    assert (go, stop, branches) == (True, False, [0.0, 1.0])
    assert others == [first]
