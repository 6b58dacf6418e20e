"""A replica of several ranks, one process a GPU each, that compute one video together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from disagg_ray.config.options import DenoiserConfig
from disagg_ray.config.rules import Check, Count, Section, between

BY_CONTENT = ("first_block", "sea")
"""Step caches that decide by how much a video changes; the others go by the number of the step."""

GATHERED_BLOCKS = 3
"""Blocks whose weights a rank holds whole at once with `shard_weights`: one computes, one waits, one is gathered."""


@dataclass(frozen=True)
class ParallelConfig(Section):
    """How the ranks of a replica split one video. All 1: a replica is one process."""

    cfg: Annotated[int, between(1, 2)] = 1
    """Ranks for the branches of classifier-free guidance: 2 computes the guided and the unguided one at once."""
    ulysses: Count = 1
    """Ranks that share the tokens of a video, and the heads of its attention."""
    ring: Count = 1
    """Ranks that share the tokens of a video, and pass keys and values around. Not to be had yet: must be 1."""
    rows: Count = 1
    """Ranks that share the rows of a video in its decoder, of which each decodes some; for the stage of the block
    `decode`."""
    shard_weights: bool = False
    """Hold an equal part of each block's weights at each rank, and gather a block's while it computes (FSDP): less VRAM
    for more traffic between ranks. Each rank still reads all of them through its host's memory when it loads."""
    spread: bool = False
    """Let the ranks lie on several nodes; false: all on one."""

    @property
    def size(self) -> int:
        """How many ranks a replica has."""
        return self.cfg * self.ulysses * self.ring * self.rows

    @property
    def num_shards(self) -> int:
        """Ranks among which the tokens of one prediction are split."""
        return self.ulysses * self.ring

    def held(self, weights: int, num_blocks: int) -> int:
        """Return about how much of a transformer's weights (parameters, or bytes) a rank holds at once."""
        return weights // self.size + GATHERED_BLOCKS * weights // num_blocks if self.shard_weights else weights

    @property
    def is_gang(self) -> bool:
        return self.size > 1

    def rules(self) -> Iterator[Check]:
        remedy = "must be false: a replica of one rank has none to share with; write cfg, ulysses, ring or rows"
        for key in ("shard_weights", "spread"):
            value = getattr(self, key)
            yield key, value, self.is_gang or not value, remedy
        ok = self.rows == 1 or not self.shard_weights
        yield "shard_weights", self.shard_weights, ok, "must be false with rows: only a transformer's are shared"
        yield "ring", self.ring, self.ring == 1, "must be 1: no attention backend was held to one process's frames yet"


def denoiser_rules(parallel: ParallelConfig, denoiser: DenoiserConfig) -> Iterator[Check]:
    """Yield the rules between the ranks of a stage's replicas and how its transformers run."""
    cache, quantization, sharded = denoiser.step_cache.method, denoiser.quantization, parallel.shard_weights
    ok = cache == "none" or not (sharded or (cache in BY_CONTENT and parallel.num_shards > 1))
    remedy = "must be mag, taylorseer or none where ranks share tokens, and none with parallel.shard_weights"
    yield "denoiser.step_cache.method", cache, ok, remedy
    ok = not parallel.is_gang or quantization == "none" or (quantization == "fp8_storage" and not sharded)
    remedy = "must be none or fp8_storage with parallel, and none with shard_weights: not held to one process's frames"
    yield "denoiser.quantization", quantization, ok, remedy
