"""How fast the ranks of a gang exchange tensors."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from disagg_ray.errors import TransferError
from disagg_ray.models.parallel.ranks import Ranks

NUM_GATHERS = 5


def gather_rate(ranks: Ranks, nbytes: int) -> float:
    """Return the bytes per second that this rank gets from the others in all-gathers of `nbytes` a rank, the fastest.

    Every rank calls it. A first one, which connects the ranks, does not count.

    Raises:
        TransferError: what arrived is not what was sent.
    """
    own = torch.full((nbytes,), ranks.rank, dtype=torch.uint8, device=ranks.device)
    parts = [torch.empty_like(own) for _ in range(ranks.size)]
    seconds = []
    for _ in range(1 + NUM_GATHERS):
        ranks.agree(True)  # so that they begin together
        began = time.perf_counter()
        dist.all_gather(parts, own)
        if ranks.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    for rank, part in enumerate(parts):
        if not bool((part == rank).all()):
            raise TransferError(f"what rank {rank} sent arrived damaged", f"rank {rank}", nbytes, 0)
    return nbytes * (ranks.size - 1) / min(seconds[1:])
