"""A replica of several ranks, one process a GPU each, that compute one video together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from disagg_ray.config.options import DenoiserConfig
from disagg_ray.config.rules import Check, Count, Section, between

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

    def held(self, num_parameters: int, num_blocks: int) -> int:
        """Return about how many of a transformer's parameters a rank that shares its weights holds at once."""
        return num_parameters // self.size + GATHERED_BLOCKS * num_parameters // num_blocks

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
    attention, cache = denoiser.attention, denoiser.step_cache.method
    remedy = "must name a backend, or be null: each rank would time them and may find another one fastest"
    yield "denoiser.attention", attention, not parallel.is_gang or attention != "auto", remedy
    ok = not parallel.is_gang or cache == "none"
    yield "denoiser.step_cache.method", cache, ok, "must be none with parallel: ranks may not decide alike"
    quantization = denoiser.quantization
    remedy = "must be none with parallel: not held to one process's frames"
    yield "denoiser.quantization", quantization, not parallel.is_gang or quantization == "none", remedy
