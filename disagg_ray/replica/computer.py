"""Who computes a replica's requests: its stage alone, or a gang of ranks with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from disagg_ray.config.schema import Config
from disagg_ray.graph import Graph
from disagg_ray.replica.messages import RankInfo, RankMemory
from disagg_ray.replica.stage import Outputs, Stage
from disagg_ray.request import ResolvedRequest


class Computer(Protocol):
    """A loaded stage, or a gang."""

    def compute(
        self, request: ResolvedRequest, tensors: Mapping[str, torch.Tensor], on_step: Callable[[int, int], None]
    ) -> Outputs:
        """Run the blocks for one request; what `on_step` raises ends the work."""

    def memory(self) -> tuple[RankMemory, ...]:
        """Return the GPU memory of each rank, of which a stage alone is one."""


def load(name: str, stage: Stage, config: Config, graph: Graph, host: str) -> tuple[Computer, tuple[RankInfo, ...]]:
    """Load a replica's stage, with its peers where it has any; return who computes, and the ranks.

    `host` is the address of this node at which ranks meet.
    """
    if not config.stages[stage.name].parallel.is_gang:
        stage.load()
        return stage, ()
    from disagg_ray.replica.gang import Gang  # replicas of one rank do without torch.distributed

    gang = Gang(name, stage, config, host)
    gang.load(graph)
    return gang, gang.ranks
