"""One request's way through the stages; what is lost on it is made again, from the last finished stage on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from disagg_ray.config.schema import Config
from disagg_ray.driver.attempt import Turn, follow
from disagg_ray.driver.calls import Actor
from disagg_ray.driver.fleet import Fleet
from disagg_ray.driver.latents import Wanted, describe, read_latents, write_latents
from disagg_ray.driver.metrics import Cause, Metrics
from disagg_ray.driver.pool import DriverPool
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import Cancelled, DisaggError, EncodeError, PoolError, ReplicaLost, StageError, TransferError
from disagg_ray.graph import LATENTS, Graph
from disagg_ray.media.video import Frames
from disagg_ray.models.checkpoint import Geometry
from disagg_ray.progress.events import Event, State
from disagg_ray.replica.messages import Encoded, Reply, Task
from disagg_ray.replica.sizing import frames_in_piece
from disagg_ray.replica.stage import RAW
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import Result, StageTiming
from disagg_ray.scheduling.blame import SETBACKS_PER_ATTEMPT
from disagg_ray.scheduling.scheduler import Job
from disagg_ray.scheduling.work import measure
from disagg_ray.transfer.handoff import AttemptKey, Handoff

logger = logging.getLogger("disagg_ray")

MAX_PAUSE_S = 5.0
"""Longest pause before a stage is tried again."""


@dataclass(frozen=True)
class RunContext:
    """What every journey works with."""

    config: Config
    graph: Graph
    geometry: Geometry
    fleet: Fleet
    driver_pool: DriverPool
    metrics: Metrics
    tell: Callable[[Event], None]
    """Hears what the driver itself knows of a request's progress."""
    driver_epoch: str = ""
    """Which driver this is."""


@dataclass(eq=False)
class _Output:
    """What a stage made, and who has it."""

    key: AttemptKey
    handoff: Handoff
    holder: Actor | None
    """None: the driver itself."""
    reply: Reply | None = None
    num_failed_pulls: int = 0


class RequestRun:
    """Lives on the driver's event loop: `travel` once; cancel that to give the request up."""

    def __init__(
        self,
        context: RunContext,
        request: ResolvedRequest,
        images: Mapping[str, torch.Tensor],
        run_id: str,
        sequence: int,
        latents_file: Path | None = None,
    ) -> None:
        self.request = request
        self._config, self._graph, self._fleet, self._driver_pool = (
            context.config,
            context.graph,
            context.fleet,
            context.driver_pool,
        )
        self._metrics, self._hear, self._driver_epoch, self._geometry = (
            context.metrics,
            context.tell,
            context.driver_epoch,
            context.geometry,
        )
        self._images, self._sequence, self._latents_file = images, sequence, latents_file
        self._id = f"{request.id}.{run_id}"
        self._keys: list[AttemptKey] = []
        self._given: Handoff | None = None
        """The images."""
        self._outputs: dict[str, _Output] = {}
        self._made_by: dict[str, dict[str, str]] = {}
        """Digests of the blocks that made each stage's output."""
        self._held: dict[str, _Output] = {}
        """Copies of latents in the driver's pool, by the stage that made them."""
        self._running: dict[str, asyncio.Task[None]] = {}
        self._queued: set[str] = set()
        """Running stages that no replica has taken yet."""
        self._holding: dict[str, asyncio.Task[None]] = {}
        self._saving: asyncio.Task[None] | None = None
        self._attempts: Counter[str] = Counter()
        """Those that a replica began."""
        self._failures: Counter[str] = Counter()
        """Of computations, by stage."""
        self._failed_at: defaultdict[str, set[str]] = defaultdict(set)
        """By stage, the replicas that failed to compute it, or twice to pull its inputs."""
        self._failed_pulls: Counter[tuple[str, str]] = Counter()
        """By stage and replica."""
        self._num_setbacks = 0
        self._tries: Counter[str] = Counter()
        """Attempts before the present one, those that no replica began included."""
        self._steps: Counter[str] = Counter()
        """Denoising steps that the present attempt is known to have done."""
        self._timings: dict[str, StageTiming] = {}

    async def travel(self) -> Result:
        """Run the stages, each once its inputs are there, until the video is here.

        Raises:
            InputError: a stage found that the request cannot be served.
            StageError: a stage failed `failures.max_attempts` times.
            TransferError: tensors did not arrive, however often it was tried.
            OutputError: the latents' file could not be written.
        """
        started = time.monotonic()
        try:
            if self._images:
                self._given = await self._driver_pool.publish(self._new_key(), self._images)
            await self._resume()
            while True:
                await self._reach(self._graph.last)
                if (video := await self._bring()) is not None:
                    order = {stage: place for place, stage in enumerate(self._graph.order)}
                    timings = sorted(self._timings.values(), key=lambda timing: order[timing.stage])
                    return Result(self.request, time.monotonic() - started, tuple(timings), *video)
        finally:
            await self._leave()

    def lose(self, actor: Actor) -> None:
        """Hear that a replica is gone, with all that it held."""
        for stage, output in list(self._outputs.items()):
            if output.holder is actor:
                self._drop(stage)

    def note(self, event: Event) -> bool:
        """Note what a replica tells; False: it is about an attempt that is over."""
        stage = event.stage
        if stage not in self._running or event.attempt != self._tries[stage]:
            return False
        if event.step > self._steps[stage]:
            self._metrics.steps(stage, event.replica, event.step - self._steps[stage])
            self._steps[stage] = event.step
        return True

    def _tell(self, stage: str, state: State, replica: str = "") -> None:
        self._hear(Event(self.request.id, stage, replica, self._tries[stage], state))

    def _new_key(self) -> AttemptKey:
        key = AttemptKey(self._id, len(self._keys))
        self._keys.append(key)
        return key

    async def _reach(self, last: str) -> None:
        """Have every output made that is missing on the way to `last`."""
        while last not in self._outputs:
            for stage in self._missing(last):
                self._running[stage] = asyncio.ensure_future(self._attempt(stage))
            pending = {*self._running.values(), *self._holding.values()}
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for stage in [stage for stage, hold in self._holding.items() if hold.done()]:
                self._holding.pop(stage).result()
            for stage in [stage for stage, attempt in self._running.items() if attempt.done()]:
                self._running.pop(stage).result()
            self._release_spent()

    def _missing(self, last: str) -> list[str]:
        """Return the stages to run now: their output is wanted and on no way, and their inputs are there."""
        wanted, ready = [last], []
        while wanted:
            stage = wanted.pop()
            if stage in self._running or stage in self._holding or stage in ready:
                continue
            lacking = [producer for producer in self._graph.producers(stage) if producer not in self._outputs]
            wanted += lacking
            if not lacking:
                ready.append(stage)
        return ready

    def _arrive(self, stage: str, output: _Output) -> None:
        if output.holder is not None and not self._fleet.is_serving(output.holder):
            return  # it died right after its answer
        self._outputs[stage] = output
        if output.holder is not None:
            self._made_by[stage] = self._fleet.blocks_of(output.holder)
        if stage == self._graph.kept:
            self._holding[stage] = asyncio.ensure_future(self._hold(stage, output))

    def _drop(self, stage: str) -> None:
        """Do without a stage's output: the driver's copy takes its place, or it is made again."""
        self._release(self._outputs.pop(stage))
        if stage in self._held:
            self._outputs[stage] = self._held[stage]
            return
        for consumer in self._queued & set(self._graph.consumers(stage)):
            self._running.pop(consumer).cancel()

    def _release_spent(self) -> None:
        """Free what all its consumers have made safe use of; latents and what the last stage reads stay until the
        end, and what the latents were made from as long as the driver has no copy of them."""
        last, kept = self._graph.last, self._graph.kept
        for stage in list(self._outputs):
            consumers = self._graph.consumers(stage)
            safe = (c in (self._held if c == kept else self._outputs) for c in consumers)
            if consumers and stage != kept and last not in consumers and all(safe):
                self._release(self._outputs.pop(stage))

    async def _attempt(self, stage: str) -> None:
        """Have a stage computed on the replica that the scheduler says; it may not come about this time."""
        began, turn, visit = time.monotonic(), Turn(), None
        work, shape = measure(self.request, self._config.stages[stage].blocks)
        avoid = frozenset(self._failed_at[stage])
        job = Job(self.request.id, work, shape, self.request.priority, self._sequence, turn.move, avoid)
        scheduler = self._fleet.schedulers[stage]
        self._queued.add(stage)
        self._tell(stage, "waiting")
        scheduler.push(job, began)
        try:
            visit = await follow(turn, self._fleet, lambda: self._task(stage))
            self._attempts[stage] += 1
            reply: Reply = await self._fleet.ask(visit.actor, "run", visit.task)
            scheduler.finish(job, time.monotonic(), reply.timing.compute_s + reply.timing.publish_s)
            self._fleet.note_success(visit.actor)
            output, visit = _Output(visit.task.key, reply.handoff, visit.actor, reply), None
        except (TransferError, ReplicaLost, StageError, PoolError, Cancelled) as error:
            scheduler.withdraw(job, time.monotonic())  # the replica need not pause
            await self._note_failure(stage, turn.actor, error, computed=visit is not None)
        except asyncio.CancelledError:
            self._end(stage, "cancelled", "cancelled")
            raise
        else:
            self._note_success(stage, reply.timing, time.monotonic() - began)
            self._arrive(stage, output)  # at once: a request that is cancelled now has to release it
        finally:
            self._queued.discard(stage)
            scheduler.withdraw(job, time.monotonic())
            if visit is not None:
                visit.leave(self._fleet)

    def _task(self, stage: str) -> Task:
        """Return a new attempt, with its inputs where they lie now."""
        self._queued.discard(stage)
        if lost := [producer for producer in self._graph.producers(stage) if producer not in self._outputs]:
            raise ReplicaLost(f"the output of {lost[0]} was lost")
        handoffs = [self._outputs[producer].handoff for producer in self._graph.producers(stage)]
        if self._given is not None and self._graph.image_inputs(stage):
            handoffs.append(self._given)
        return Task(self._new_key(), self.request, tuple(handoffs), self._tries[stage], self._driver_epoch)

    def _end(self, stage: str, state: State, cause: Cause, replica: str = "") -> None:
        """Tell how an attempt ended."""
        self._metrics.attempt(stage, cause)
        self._tell(stage, state, replica)
        self._tries[stage] += 1
        self._steps[stage] = 0

    def _note_success(self, stage: str, timing: StageTiming, elapsed: float) -> None:
        queue_s = max(0.0, elapsed - timing.pull_s - timing.compute_s - timing.publish_s)
        timing = self._timings[stage] = replace(timing, queue_s=queue_s, attempts=self._attempts[stage])
        self._metrics.stage_finished(timing)
        if "denoise" in self._config.stages[stage].blocks:  # steps that no event told of
            self._metrics.steps(stage, timing.replica, self.request.num_inference_steps - self._steps[stage])
        self._end(stage, "done", "ok", timing.replica)
        self._log(logging.DEBUG, "%s done in %.2f s", timing.replica, timing.compute_s)

    async def _note_failure(self, stage: str, actor: Actor | None, error: DisaggError, *, computed: bool) -> None:
        """Count a failed attempt at a replica, as `blame` says, and say what is to be made again."""
        stalled = actor is not None and self._fleet.has_stalled(actor)
        lost: Cause = "stalled" if stalled else "drained" if getattr(error, "with_node", False) else "died"
        causes: dict[type[DisaggError], Cause] = {ReplicaLost: lost, TransferError: "transfer", Cancelled: "cancelled"}
        self._end(stage, "failed", causes.get(type(error), "error"))
        if isinstance(error, TransferError):
            self._note_setback(error)
            self._doubt_inputs(stage, error)
            if actor is not None:
                self._doubt_replica(stage, actor)
            await asyncio.sleep(min(0.05 * 2**self._num_setbacks, MAX_PAUSE_S))
        elif isinstance(error, ReplicaLost) and (error.with_node or not computed):
            self._note_setback(error)
        else:
            await self._charge(stage, actor, error)

    async def _charge(self, stage: str, actor: Actor | None, error: DisaggError) -> None:
        """Count a failed computation; where every replica has failed it, let others show whether they can."""
        self._failures[stage] += 1
        if actor is not None:
            if isinstance(error, StageError | PoolError | EncodeError):
                self._fleet.note_failure(actor, self._id, self._failed_at[stage], error)
            self._failed_at[stage].add(actor.id)
        allowed = self._config.failures.max_attempts
        if self._failures[stage] >= allowed:
            said = f"{stage} failed {allowed} times (failures.max_attempts), at last so: {error}"
            raise StageError(said) from error
        self._log(logging.WARNING, "%s is tried again: %s", stage, error)
        if self._failed_at[stage].issuperset(self._fleet.schedulers[stage].replicas):
            await asyncio.sleep(min(2.0 ** (self._failures[stage] - 1), MAX_PAUSE_S))

    def _doubt_replica(self, stage: str, actor: Actor) -> None:
        """A replica could not pull this stage's inputs: another is to try when it fails a second time."""
        self._failed_pulls[stage, actor.id] += 1
        if self._failed_pulls[stage, actor.id] > 1:
            self._failed_at[stage].add(actor.id)

    def _log(self, level: int, message: str, *args: object) -> None:
        logger.log(level, f"request %s: {message}", self.request.id, *args, extra={"request_id": self.request.id})

    def _note_setback(self, error: DisaggError) -> None:
        self._num_setbacks += 1
        if self._num_setbacks >= SETBACKS_PER_ATTEMPT * self._config.failures.max_attempts:
            raise error
        self._log(logging.INFO, "%s", error)

    def _doubt_inputs(self, stage: str, error: TransferError) -> None:
        """An input did not arrive: take the driver's copy, or make it again when it fails a second time."""
        for producer in self._graph.producers(stage):
            output = self._outputs.get(producer)
            if output is None or output.holder is None:
                continue
            if error.session in {session.name for session in output.handoff.sessions}:
                output.num_failed_pulls += 1
                if producer in self._held or output.num_failed_pulls > 1:
                    self._drop(producer)

    async def _hold(self, stage: str, output: _Output) -> None:
        """Copy latents here, and to their file; from then on nothing that dies costs the denoise."""
        key = self._new_key()
        try:
            handoff, tensors = await self._driver_pool.hold(key, output.handoff)
        except (TransferError, PoolError, Cancelled) as error:
            self._log(logging.INFO, "the driver has no copy of the %s's output: %s", stage, error)
            self._driver_pool.release(key)
            return
        self._held[stage] = _Output(key, handoff, None)
        self._outputs.setdefault(stage, self._held[stage])
        if self._latents_file is not None and set(tensors) == {LATENTS}:
            blocks = [self._made_by[maker] for maker in self._graph.upstream(stage)]
            about = describe(self.request, {block: digest for made in blocks for block, digest in made.items()})
            saving = off_loop(write_latents, self._latents_file, tensors[LATENTS], about)
            self._saving = asyncio.ensure_future(saving)
            await asyncio.shield(self._saving)

    async def _resume(self) -> None:
        """Take up an earlier run's latents, if they are this request's."""
        stage, request = self._graph.kept, self.request
        if self._latents_file is None or stage is None or self._graph.outputs(stage) != (LATENTS,):
            return
        blocks = {b: d for maker in self._graph.upstream(stage) for b, d in self._fleet.digests_of(maker).items()}
        shape = self._geometry.latents_shape(request.height, request.width, request.num_frames)
        latents = await off_loop(read_latents, self._latents_file, Wanted(request, blocks, shape))
        if latents is None:
            return
        key, tensors = self._new_key(), {LATENTS: latents}
        self._held[stage] = self._outputs[stage] = _Output(key, await self._driver_pool.publish(key, tensors), None)
        self._log(logging.INFO, "goes on from %s", self._latents_file)

    async def _bring(self) -> tuple[bytes | None, Frames | None] | None:
        """Return the file and no frames, or no file and the raw frames; None: they were lost on the way."""
        output = self._outputs[self._graph.last]
        try:
            return (
                (None, await self._frames(output)) if self.request.format in RAW else (await self._file(output), None)
            )
        except (ReplicaLost, TransferError) as error:
            if output.holder is not None and self._fleet.has_stalled(output.holder):  # it may be these frames
                await self._note_failure(self._graph.last, output.holder, error, computed=True)
            else:
                self._note_setback(error)
        except (EncodeError, StageError, PoolError) as error:
            await self._note_failure(self._graph.last, output.holder, error, computed=True)
        if self._graph.last in self._outputs:
            self._drop(self._graph.last)
        return None

    async def _file(self, output: _Output) -> bytes:
        """Have the file encoded where the frames are."""
        assert output.holder is not None, "the last stage's output is never held"
        request, last = self.request, self._graph.last
        arguments = output.key, request.fps, request.format
        encoded: Encoded = await self._fleet.ask(output.holder, "encode", *arguments)
        self._timings[last] = replace(self._timings[last], encode_s=encoded.seconds)
        self._metrics.encoded(last, output.holder.name, encoded.seconds)
        return encoded.data

    async def _frames(self, output: _Output) -> Frames:
        """Bring the raw frames here piece by piece."""
        assert output.reply is not None and output.holder is not None, "the last stage's output is never held"
        request, num_frames = self.request, output.reply.num_frames
        frames = np.empty((num_frames, request.height, request.width, 3), np.float32)
        for start in range(0, num_frames, frames_in_piece(request.height * request.width, num_frames)):
            piece = await self._fleet.ask(output.holder, "piece", output.key, start)
            await self._driver_pool.pull_frames(piece, frames[start:])
        return frames

    def _release(self, output: _Output) -> None:
        """Free an output's slots where they are; a dead replica has none."""
        if output.holder is None:
            self._driver_pool.release(output.key)
        else:
            self._fleet.send(output.holder, "release", output.key)

    async def _leave(self) -> None:
        """Leave nothing behind, here or at any replica."""
        tasks: list[asyncio.Future[None]] = [*self._running.values(), *self._holding.values()]
        for task in tasks:
            task.cancel()
        for output in self._outputs.values():
            if output.holder is not None:
                self._release(output)
        if self._saving is None:
            self._release_held()
        else:
            self._saving.add_done_callback(self._release_held)  # what is being written must stay as it is
            tasks.append(asyncio.shield(self._saving))
        await asyncio.gather(*tasks, return_exceptions=True)

    def _release_held(self, _: object = None) -> None:
        for key in self._keys:
            self._driver_pool.release(key)
