"""How many replicas a stage is to have: decided by the predicted wait, without a clock or I/O."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_ray.config.deployment import ServiceConfig

if TYPE_CHECKING:
    from disagg_ray.driver.metrics import Reason


@dataclass(frozen=True)
class Load:
    """A stage's replicas and its work."""

    least: int
    most: int
    """Bounds of its number of replicas."""
    wanted: int
    """Replicas it is to have now."""
    ready: int
    starting: int
    """The rest of `wanted` pause between attempts to start (`blame`)."""
    busy: int
    outstanding_s: float
    """Predicted replica seconds of all requests, including those that wait for admission."""
    room: int
    """How many more replicas the cluster can take."""

    @property
    def paused(self) -> int:
        return max(0, self.wanted - self.ready - self.starting)


@dataclass(frozen=True)
class Decision:
    stage: str
    replicas: int
    reason: Reason
    detail: str


@dataclass(eq=False)
class _Memory:
    late_since: float | None = None
    """Since when the predicted wait has been too long."""
    spare_since: float | None = None
    """Since when fewer replicas would have sufficed."""
    most_busy: int = 0
    """In that time."""


class Scaler:
    """Decides for each stage, from its load every few seconds."""

    def __init__(self, settings: ServiceConfig) -> None:
        self._settings = settings
        self._memories: dict[str, _Memory] = {}

    def decide(self, stage: str, load: Load, now: float) -> Decision | None:
        """Return how many replicas a stage is to have from now on; None if that does not change."""
        memory = self._memories.setdefault(stage, _Memory())
        decision = self._more(stage, load, memory, now) or self._fewer(stage, load, memory, now)
        if decision is not None:
            self._memories[stage] = _Memory()
        return decision

    def _more(self, stage: str, load: Load, memory: _Memory, now: float) -> Decision | None:
        """Add as many as bring the wait down to the target, once it has been too long for a while."""
        target, wait = self._settings.target_wait_s, load.outstanding_s / max(load.ready, 1)
        if wait <= target or load.wanted >= load.most:
            memory.late_since = None
            return None
        memory.late_since = now if memory.late_since is None else memory.late_since
        room = load.room if not self._settings.cluster_grows else load.most
        number = min(math.ceil(load.outstanding_s / target) + load.paused, load.most, load.wanted + room)
        if now - memory.late_since < self._settings.patience_s or load.starting or number <= load.wanted:
            return None
        return Decision(stage, number, "wait", f"a wait of {wait:.1f} s is predicted, target_wait_s is {target:g}")

    def _fewer(self, stage: str, load: Load, memory: _Memory, now: float) -> Decision | None:
        """Remove replicas that were not needed for a while."""
        late = load.outstanding_s > self._settings.target_wait_s
        if load.starting or late or load.busy >= load.ready or load.wanted <= load.least:
            memory.spare_since, memory.most_busy = None, 0
            return None
        if memory.spare_since is None:
            memory.spare_since = now
        memory.most_busy = max(memory.most_busy, load.busy)
        number = max(load.least, memory.most_busy + load.paused)
        if now - memory.spare_since < self._settings.idle_s or number >= load.wanted:
            return None
        detail = f"at most {memory.most_busy} of {load.wanted} were busy for idle_s={self._settings.idle_s:g} s"
        return Decision(stage, number, "idle", detail)
