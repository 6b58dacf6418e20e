"""What the failures of one request cost it, by the rules of `scheduling.blame`."""

from __future__ import annotations

import asyncio
import logging

from disagg_ray.driver.attempt import StageRun
from disagg_ray.driver.calls import Actor
from disagg_ray.driver.context import RunContext
from disagg_ray.driver.metrics import Cause
from disagg_ray.driver.outputs import Outputs
from disagg_ray.errors import Cancelled, DisaggError, EncodeError, PoolError, ReplicaLost, StageError, TransferError
from disagg_ray.scheduling.blame import SETBACKS_PER_ATTEMPT

logger = logging.getLogger("disagg_ray")

MAX_PAUSE_S = 5.0
"""Longest pause before a stage is tried again."""


class Failures:
    """Counts failures; each call raises when the request has no attempt left."""

    def __init__(self, context: RunContext, request_id: str, run_id: str, outputs: Outputs) -> None:
        self._fleet, self._outputs = context.fleet, outputs
        self._max_attempts = context.config.failures.max_attempts
        self._request_id, self._run_id = request_id, run_id
        self._num_setbacks = 0

    def cause_of(self, actor: Actor | None, error: DisaggError) -> Cause:
        """Return what the metrics call an attempt's failure at a replica."""
        if isinstance(error, ReplicaLost):
            stalled = actor is not None and self._fleet.has_stalled(actor)
            return "stalled" if stalled else "drained" if error.with_node else "died"
        return (
            "transfer" if isinstance(error, TransferError) else "cancelled" if isinstance(error, Cancelled) else "error"
        )

    async def count(self, stage: StageRun, actor: Actor | None, error: DisaggError, *, computed: bool) -> None:
        """Count a failed attempt of a stage at a replica, which had begun to compute or not; pause before the next.

        Raises:
            DisaggError: the request fails with it.
        """
        if isinstance(error, TransferError):
            self.count_setback(error)
            self._outputs.count_failed_pull(stage, error)
            if actor is not None:
                stage.failed_pulls[actor.id] += 1
                if stage.failed_pulls[actor.id] > 1:
                    stage.failed_at.add(actor.id)
            await asyncio.sleep(min(0.05 * 2**self._num_setbacks, MAX_PAUSE_S))
        elif isinstance(error, ReplicaLost) and (error.with_node or not computed):
            self.count_setback(error)
        else:
            await self._charge(stage, actor, error)

    def count_setback(self, error: DisaggError) -> None:
        """Count a failure that cost no computing.

        Raises:
            DisaggError: this one, when there were too many.
        """
        self._num_setbacks += 1
        if self._num_setbacks >= SETBACKS_PER_ATTEMPT * self._max_attempts:
            raise error
        self._log(logging.INFO, "%s", error)

    async def _charge(self, stage: StageRun, actor: Actor | None, error: DisaggError) -> None:
        """Count a failed computation; pause once every replica has failed it, so that others can show they work."""
        stage.num_failures += 1
        if actor is not None:
            if isinstance(error, StageError | PoolError | EncodeError):
                self._fleet.note_failure(actor, self._run_id, stage.failed_at, error)
            stage.failed_at.add(actor.id)
        if stage.num_failures >= self._max_attempts:
            said = (
                f"{stage.name} failed {self._max_attempts} times (failures.max_attempts), the last time with: {error}"
            )
            raise StageError(said) from error
        self._log(logging.WARNING, "%s is tried again: %s", stage.name, error)
        if stage.failed_at.issuperset(self._fleet.schedulers[stage.name].replicas):
            await asyncio.sleep(min(2.0 ** (stage.num_failures - 1), MAX_PAUSE_S))

    def _log(self, level: int, message: str, *args: object) -> None:
        logger.log(level, f"request %s: {message}", self._request_id, *args, extra={"request_id": self._request_id})
