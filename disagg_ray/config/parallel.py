"""A replica of several ranks, one process a GPU each, that compute one video together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from disagg_ray.config.rules import Check, Count, Section, between


@dataclass(frozen=True)
class ParallelConfig(Section):
    """How the ranks of a replica split one video. All 1: a replica is one process."""

    cfg: Annotated[int, between(1, 2)] = 1
    """Ranks for the branches of classifier-free guidance: 2 computes the guided and the unguided one at once."""
    ulysses: Count = 1
    """Ranks that share the tokens of a video, and the heads of its attention."""
    ring: Count = 1
    """Ranks that share the tokens of a video, and pass keys and values around. For attention backends that return a
    log-sum-exp."""
    shard_weights: bool = False
    """Hold a part of the weights at each rank and gather each block when it computes: less VRAM, more time."""
    spread: bool = False
    """Let the ranks lie on several nodes; false: all on one."""

    @property
    def size(self) -> int:
        """How many ranks a replica has."""
        return self.cfg * self.ulysses * self.ring

    @property
    def is_gang(self) -> bool:
        return self.size > 1

    def rules(self) -> Iterator[Check]:
        remedy = "must be false: a replica of one rank has none to share with; write cfg, ulysses or ring"
        for key in ("shard_weights", "spread"):
            value = getattr(self, key)
            yield key, value, self.is_gang or not value, remedy
