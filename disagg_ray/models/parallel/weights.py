"""The weights of a transformer's blocks over all ranks of a gang, through FSDP2."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from disagg_ray.config.parallel import GATHERED_BLOCKS
from disagg_ray.models.parallel.ranks import Ranks


def shard_weights(transformer: Any, ranks: Ranks) -> int:
    """Keep an equal part of each block's weights at each rank, and all of them only while the block computes.

    Weights come from the host a block at a time, and what is outside blocks comes whole, so that no GPU ever holds the
    model. Gathering changes no bit. Return the most bytes of weights that a rank holds at once.
    """
    transformer.requires_grad_(False)  # FSDP wants one precision of what it trains
    mesh = init_device_mesh(ranks.device, (ranks.size,), mesh_dim_names=("shards",))
    largest = max(sum(weight.nbytes for weight in block.parameters()) for block in transformer.blocks)
    for block in transformer.blocks:
        fully_shard(block, mesh=mesh)
    transformer.to(ranks.device)
    whole = {weight for weight in transformer.parameters() if not isinstance(weight, DTensor)}
    fully_shard(transformer, mesh=mesh, ignored_params=whole)  # lets a block be gathered while another one computes
    shares = sum(weight.to_local().nbytes for weight in transformer.parameters() if isinstance(weight, DTensor))
    return int(shares + sum(weight.nbytes for weight in whole) + GATHERED_BLOCKS * largest)
