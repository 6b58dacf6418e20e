"""Pulls the inputs of a replica's tasks into its pool."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from disagg_ray.replica.activity import Activities
from disagg_ray.replica.messages import Task
from disagg_ray.replica.stage import Stage
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool

READS_EACH = 2
"""Times Mooncake may be given `transport.timeout_s` for one tensor, and to reach its peer."""


@dataclass(frozen=True)
class Pulled:
    """Inputs of a task."""

    tensors: dict[str, torch.Tensor]
    """In the replica's pool."""
    seconds: float
    """Room for them was waited for, too."""


class Puller:
    """Thread-safe. What it waits for counts as a replica's activity, unless others have to act first."""

    def __init__(self, stage: Stage, pool: Pool, activities: Activities) -> None:
        self._stage, self._pool, self._activities = stage, pool, activities
        self._timeout_s = stage.config.transport.timeout_s

    def pull(self, task: Task) -> Pulled:
        """Reserve room for a task's inputs and outputs, and pull the inputs; on an error the caller releases its key.

        Raises:
            Cancelled: the task was released meanwhile.
            TransferError: an input did not arrive.
        """
        started, stage = time.monotonic(), self._stage
        wanted = {h: [t for t in h.tensors if t.name in stage.ports.inputs] for h in task.handoffs}
        sizes = {t.name: t.spec.nbytes for metas in wanted.values() for t in metas}
        self._reserve(task.key, sizes | stage.output_bytes(task.request))
        tensors: dict[str, torch.Tensor] = {}
        for handoff, metas in wanted.items():
            tensors |= self._read(task.key, handoff, [meta.name for meta in metas])
        return Pulled(tensors, time.monotonic() - started)

    def _reserve(self, key: AttemptKey, sizes: dict[str, int]) -> None:
        """Wait for room until others release some; it is a hang only if their releases could not be enough."""
        with self._activities.working("reserve", lambda: time.monotonic() if self._pool.can_hold(sizes) else 0.0):
            self._pool.reserve(key, sizes)

    def _read(self, key: AttemptKey, handoff: Handoff, names: list[str]) -> dict[str, torch.Tensor]:
        """Pull tensors; it is a hang of this replica only after every deadline of the read."""
        ends = time.monotonic() + READS_EACH * (1 + len(names)) * self._timeout_s
        with self._activities.working("pull", lambda: ends):
            return self._pool.pull(key, handoff, names)
