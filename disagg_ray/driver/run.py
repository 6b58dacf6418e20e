"""One request's run: attempt each stage until its output is there, then fetch the video.

What a replica holds is lost with it. The loop in `_make_last_output` computes again whatever is missing, starting from
the outputs that are left. Beside this file: `attempt` follows one attempt to a replica, `outputs` owns the slots,
`failures` decides what a failure costs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from disagg_ray.driver.attempt import Attempt, StageRun
from disagg_ray.driver.calls import Actor
from disagg_ray.driver.context import RunContext
from disagg_ray.driver.failures import Failures
from disagg_ray.driver.metrics import Cause
from disagg_ray.driver.outputs import Outputs, Video
from disagg_ray.errors import Cancelled, EncodeError, PoolError, ReplicaLost, StageError, TransferError
from disagg_ray.progress.events import Event, State
from disagg_ray.replica.messages import Task
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import Result, StageTiming

logger = logging.getLogger("disagg_ray")


class RequestRun:
    """Lives on the driver's event loop. Call `run` once; cancel it to cancel the request."""

    def __init__(
        self,
        context: RunContext,
        request: ResolvedRequest,
        images: Mapping[str, torch.Tensor],
        run_id: str,
        sequence: int,
        latents_file: Path | None,
    ) -> None:
        """Prepare a run; `run_id` tells it from other runs of the request, `sequence` is its place in every queue."""
        self.request = request
        self._context, self._images, self._sequence = context, images, sequence
        self._stages = {name: StageRun(name) for name in context.graph.order}
        self._last = self._stages[context.graph.last]
        slots = f"{request.id}.{run_id}"
        self._outputs = Outputs(context, request, slots, self._stages, latents_file)
        self._failures = Failures(context, request.id, slots, self._outputs)

    async def run(self) -> Result:
        """Run the stages, each once its inputs are there, until the video is here.

        Raises:
            InputError: a stage found that it cannot serve the request.
            StageError: a stage failed `failures.max_attempts` times.
            TransferError: tensors did not arrive, however often they were pulled.
        """
        started = time.monotonic()
        try:
            await self._outputs.begin(self._images)
            while True:
                await self._make_last_output()
                if (video := await self._fetch_video()) is not None:
                    timings = tuple(stage.timing for stage in self._stages.values() if stage.timing is not None)
                    seconds = time.monotonic() - started
                    return Result(self.request, seconds, timings, video.data, video.frames, video.sound)
        finally:
            await self._outputs.close()

    async def _make_last_output(self) -> None:
        """Compute whatever is missing until the last stage has its output."""
        while self._last.output is None:
            for stage in self._ready_stages():
                stage.computing = asyncio.ensure_future(self._compute(stage))
            tasks = [task for stage in self._stages.values() for task in stage.tasks]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for stage in self._stages.values():
                if stage.copying is not None and stage.copying.done():
                    copying, stage.copying = stage.copying, None
                    copying.result()
                if stage.computing is not None and stage.computing.done():
                    computing, stage.computing = stage.computing, None
                    computing.result()
            self._outputs.release_used()

    def _ready_stages(self) -> list[StageRun]:
        """Return the stages to start now: their output is needed and not under way, and their inputs are there."""
        needed, ready = [self._last], list[StageRun]()
        while needed:
            stage = needed.pop()
            if stage.is_busy or stage in ready:
                continue
            producers = [self._stages[name] for name in self._context.graph.producers(stage.name)]
            missing = [producer for producer in producers if producer.output is None]
            needed += missing
            if not missing:
                ready.append(stage)
        return ready

    async def _compute(self, stage: StageRun) -> None:
        """Attempt a stage once; on failure, return when it may be attempted again."""
        fleet, avoid = self._context.fleet, frozenset(stage.failed_at)
        attempt = Attempt(fleet, stage.name, stage.num_attempts, self.request, self._sequence, avoid)
        stage.attempt, stage.num_attempts = attempt, stage.num_attempts + 1
        self._publish(stage, "waiting")
        try:
            task, reply = await attempt.run(partial(self._make_task, stage, attempt))
        except (TransferError, ReplicaLost, StageError, PoolError, Cancelled) as error:
            stage.num_run += attempt.has_run
            self._end(stage, "failed", self._failures.cause_of(attempt.actor, error))
            await self._failures.count(stage, attempt.actor, error, computed=attempt.has_run)
        except asyncio.CancelledError:
            self._end(stage, "cancelled", "cancelled")
            raise
        else:  # without a wait in between: a cancelled request has to release this output too
            stage.num_run += 1
            assert attempt.actor is not None
            self._finish(stage, attempt, attempt.actor, reply.timing)
            self._outputs.add(stage, task.key, attempt.actor, reply)

    def _make_task(self, stage: StageRun, attempt: Attempt) -> Task:
        """Return what a replica is asked to compute, with the inputs where they are now."""
        handoffs, key = self._outputs.handoffs(stage.name), self._outputs.new_key()
        return Task(key, self.request, handoffs, attempt.number, self._context.driver_epoch)

    def _finish(self, stage: StageRun, attempt: Attempt, actor: Actor, timing: StageTiming) -> None:
        """Record the time that a stage took, and count it in the metrics."""
        metrics, replica = self._context.metrics, timing.replica
        queue_s = max(0.0, attempt.seconds - timing.pull_s - timing.compute_s - timing.publish_s)
        stage.timing = replace(
            timing, queue_s=queue_s, attempts=stage.num_run, num_ranks=actor.num_ranks, num_gpus=actor.num_gpus
        )
        metrics.stage_finished(stage.timing)
        if "denoise" in self._context.config.stages[stage.name].blocks:  # steps without an event of their own
            metrics.steps(stage.name, replica, self.request.num_inference_steps - attempt.num_steps)
        self._end(stage, "done", "ok", replica)
        ranks = f" ({actor.num_ranks} ranks)" if actor.num_ranks > 1 else ""
        self._log("%s%s done in %.2f s", replica, ranks, timing.compute_s)

    async def _fetch_video(self) -> Video | None:
        """Return the video, or None if it was lost, failed to encode or to arrive: the last stage runs again."""
        stage, output = self._last, self._last.output
        assert output is not None and output.holder is not None and stage.timing is not None
        try:
            video = await self._outputs.fetch_video(output)
        except (ReplicaLost, TransferError, EncodeError, StageError, PoolError) as error:
            blameless = isinstance(error, ReplicaLost | TransferError)
            if blameless and not self._context.fleet.has_stalled(output.holder):
                self._failures.count_setback(error)
            else:  # a replica that stalled may have stalled on these frames
                self._end(stage, "failed", self._failures.cause_of(output.holder, error))
                await self._failures.count(stage, output.holder, error, computed=True)
            if stage.output is not None:
                self._outputs.drop(stage)
            return None
        if video.encode_s is not None:
            stage.timing = replace(stage.timing, encode_s=video.encode_s)
            self._context.metrics.encoded(stage.name, output.holder.name, video.encode_s)
        return video

    def lose_replica(self, actor: Actor) -> None:
        """Do without what a lost replica held."""
        self._outputs.drop_all_of(actor)

    def handle_event(self, event: Event) -> bool:
        """Count the steps that a replica reports; return False for an event of an attempt that is over."""
        stage = self._stages.get(event.stage)
        attempt = stage.attempt if stage is not None and stage.computing is not None else None
        if attempt is None or attempt.is_over or event.attempt != attempt.number:
            return False
        if event.step > attempt.num_steps:
            self._context.metrics.steps(event.stage, event.replica, event.step - attempt.num_steps)
            attempt.num_steps = event.step
        return True

    def _end(self, stage: StageRun, state: State, cause: Cause, replica: str = "") -> None:
        """Count and publish how an attempt ended."""
        self._context.metrics.attempt(stage.name, cause)
        self._publish(stage, state, replica)

    def _publish(self, stage: StageRun, state: State, replica: str = "") -> None:
        assert stage.attempt is not None
        self._context.publish(Event(self.request.id, stage.name, replica, stage.attempt.number, state))

    def _log(self, message: str, *args: object) -> None:
        logger.debug(f"request %s: {message}", self.request.id, *args, extra={"request_id": self.request.id})
