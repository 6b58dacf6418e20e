"""The tokens of one video over several ranks, through diffusers' context parallelism."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig as Applied
from torch import Tensor

from disagg_ray.errors import ConfigError
from disagg_ray.models.parallel.ranks import Ranks


def split_tokens(key: str, transformer: Any, ranks: Ranks) -> None:
    """Have each rank compute an equal share of a transformer's tokens, with the arithmetic of one process.

    Its attention backend must be set already. Diffusers' modes for shares that differ gather tensors of several sizes,
    which gloo refuses: they could not be held to stock here.

    Raises:
        ConfigError: the heads do not divide, or the attention backend cannot; names the stage's `key`.
    """
    parallel, heads = ranks.parallel, transformer.config.num_attention_heads
    if heads % parallel.ulysses:
        able = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ConfigError(
            f"invalid {key}.parallel.ulysses={parallel.ulysses}: must divide the {heads} attention heads of this "
            f"model; write one of {able}"
        )
    config = ContextParallelConfig(ring_degree=parallel.ring, ulysses_degree=parallel.ulysses, mesh=ranks.mesh)
    transformer._resolve_parallel_config = partial(_resolve, transformer, ranks)
    plan = {module: shares for module, shares in transformer._cp_plan.items() if module in ("rope", "proj_out")}
    try:
        transformer.enable_parallelism(config=config, cp_plan=plan)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key}.denoiser.attention: cannot be had with parallel: {reason}") from error
    transformer.condition_embedder.register_forward_hook(partial(_share_times, ranks))
    transformer.blocks[0].register_forward_pre_hook(partial(_share_tokens, ranks))


def _resolve(transformer: Any, ranks: Ranks, config: ContextParallelConfig) -> Applied:
    """Stand in for diffusers' own, which divides by the number of GPUs in this process, perhaps 0."""
    applied = Applied(context_parallel_config=config)
    applied.setup(ranks.rank, ranks.size, torch.device(ranks.device), mesh=ranks.mesh)
    transformer._parallel_config = applied
    return applied


def _share(ranks: Ranks, tokens: Tensor) -> Tensor:
    """Return this rank's part of tokens (batch, tokens, channels)."""
    return tokens.chunk(ranks.parallel.num_shards, dim=1)[ranks.mesh["ulysses"].get_local_rank()]


def _share_tokens(ranks: Ranks, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Keep this rank's share of what enters the first block, before its step cache sees it: a forward pre-hook.

    Diffusers' own plan shares it within, where a cache that skips the block would miss it.
    """
    return _share(ranks, inputs[0]), *inputs[1:]


def _share_times(ranks: Ranks, _: Any, __: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
    """Keep this rank's share of embedded timesteps (batch, tokens, channels), where each token has one: a forward hook.

    Diffusers' own plan shares the timesteps before they are embedded, and the embedding of fewer rows rounds otherwise.
    """
    *times, text, image = output
    if times[0].dim() == 2:
        return output
    return *(_share(ranks, time) for time in times), text, image
