"""A transformer over the ranks of a gang: its tokens, and its weights."""

from __future__ import annotations

from typing import Any

from disagg_ray.models.load import weight_bytes
from disagg_ray.models.parallel.ranks import Ranks
from disagg_ray.models.parallel.tokens import split_tokens
from disagg_ray.models.parallel.weights import shard_weights


def spread(key: str, transformer: Any, ranks: Ranks) -> int:
    """Have all ranks compute a tuned transformer together; return the most bytes of weights that this one holds.

    Raises:
        ConfigError: it cannot be split so; names the stage's `key`.
    """
    if ranks.parallel.num_shards > 1:
        split_tokens(key, transformer, ranks)
    return shard_weights(transformer, ranks) if ranks.parallel.shard_weights else weight_bytes(transformer)
