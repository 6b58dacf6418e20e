"""What the stages of one request made, from a stage's answer to the release of its slots."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from disagg_ray.driver.attempt import Output, StageRun
from disagg_ray.driver.calls import Actor
from disagg_ray.driver.context import RunContext
from disagg_ray.driver.latents import Wanted, describe, read_latents, write_latents
from disagg_ray.driver.threads import off_loop
from disagg_ray.errors import Cancelled, OutputError, PoolError, ReplicaLost, TransferError
from disagg_ray.graph import LATENTS
from disagg_ray.media.sound import Sound, read_wav
from disagg_ray.media.video import Frames
from disagg_ray.replica.messages import Encoded, Reply
from disagg_ray.replica.sizing import frames_in_piece
from disagg_ray.replica.stage import RAW
from disagg_ray.request import ResolvedRequest
from disagg_ray.transfer.handoff import AttemptKey, Handoff

logger = logging.getLogger("disagg_ray")

COPY_S = 5.0
"""How long a cancelled request waits for the copy of its finished latents."""


@dataclass(frozen=True)
class Video:
    """Either the encoded file or the raw frames."""

    data: bytes | None = None
    frames: Frames | None = None
    encode_s: float | None = None
    """Seconds that encoding the file took; None for raw frames."""
    sound: Sound | None = None
    """Of npy."""


class Outputs:
    """Owns every slot that a request takes; `close` leaves none behind, here or at any replica."""

    def __init__(
        self,
        context: RunContext,
        request: ResolvedRequest,
        run_id: str,
        stages: Mapping[str, StageRun],
        latents_file: Path | None,
    ) -> None:
        """Start without outputs; `run_id` names the request's slots in every pool."""
        self._graph, self._geometry = context.graph, context.geometry
        self._fleet, self._driver_pool = context.fleet, context.driver_pool
        self._request, self._run_id, self._stages, self._latents_file = request, run_id, stages, latents_file
        self._keys: list[AttemptKey] = []
        self._images: Handoff | None = None
        self._saving: asyncio.Task[None] | None = None
        self._copied = asyncio.Event()
        """The latest copy has arrived and is being written, or failed."""

    def new_key(self) -> AttemptKey:
        key = AttemptKey(self._run_id, len(self._keys))
        self._keys.append(key)
        return key

    async def begin(self, images: Mapping[str, torch.Tensor]) -> None:
        """Put the request's images, and its latents if the file of an earlier run has them, where stages can pull them.

        Room for all is taken at once: requests that held some and waited for more would wait for each other.
        """
        latents = await self._read_latents()
        tensors = dict(images) if latents is None else {**images, LATENTS: latents}
        if not tensors:
            return
        key = self.new_key()
        handoff = await self._driver_pool.publish(key, tensors)
        if images:
            self._images = handoff.only(images)
        if latents is not None:
            assert self._graph.kept is not None, "latents were read for it"
            stage = self._stages[self._graph.kept]
            stage.copy = stage.output = Output(key, handoff.only((LATENTS,)), None)
            self._log("resumes from %s", self._latents_file)

    async def _read_latents(self) -> torch.Tensor | None:
        name, request = self._graph.kept, self._request
        if self._latents_file is None or name is None or self._graph.outputs(name) != (LATENTS,):
            return None
        blocks: dict[str, set[str]] = {}
        for maker in self._graph.upstream(name):
            blocks |= self._fleet.digests_of(maker)
        shape = self._geometry.latents_shape(request.height, request.width, request.num_frames)
        return await off_loop(read_latents, self._latents_file, Wanted(request, blocks, shape))

    def handoffs(self, stage: str) -> tuple[Handoff, ...]:
        """Return where the inputs of a stage are now.

        Raises:
            ReplicaLost: one was lost.
        """
        found = []
        for producer in self._graph.producers(stage):
            if (output := self._stages[producer].output) is None:
                raise ReplicaLost(f"the output of {producer} was lost")
            found.append(output.handoff)
        if self._images is not None and self._graph.image_inputs(stage):
            found.append(self._images)
        return tuple(found)

    def add(self, stage: StageRun, key: AttemptKey, actor: Actor, reply: Reply) -> None:
        """Take what a replica has just computed, unless it died right after its answer; start to copy latents."""
        if not self._fleet.is_serving(actor):
            return
        output = stage.output = Output(key, reply.handoff, actor, reply)
        stage.blocks = actor.info.blocks if actor.info is not None else {}
        if stage.name == self._graph.kept:
            stage.copy_key = self.new_key()
            stage.copying = asyncio.ensure_future(self._copy(stage, output, stage.copy_key))

    async def _copy(self, stage: StageRun, output: Output, key: AttemptKey) -> None:
        """Copy latents into the driver's pool and their file; from then on no replica's death costs the denoise."""
        self._copied.clear()
        try:
            handoff, tensors = await self._driver_pool.hold(key, output.handoff)
        except (TransferError, PoolError, Cancelled) as error:
            self._log("the driver has no copy of the %s's output: %s", stage.name, error)
            self._driver_pool.release(key)
            self._copied.set()
            return
        stage.copy = Output(key, handoff, None)
        stage.output = stage.output or stage.copy
        if self._latents_file is not None and set(tensors) == {LATENTS}:
            blocks: dict[str, str] = {}
            for maker in self._graph.upstream(stage.name):
                blocks |= self._stages[maker].blocks
            about = describe(self._request, blocks)
            saving = off_loop(write_latents, self._latents_file, tensors[LATENTS], about)
            self._saving = asyncio.ensure_future(saving)
        self._copied.set()
        if self._saving is not None:
            try:
                await asyncio.shield(self._saving)
            except OutputError as error:  # as of a full disk; the request goes on without its file
                logger.warning("request %s: %s", self._request.id, error, extra={"request_id": self._request.id})

    async def fetch_video(self, output: Output) -> Video:
        """Have the last stage's replica encode the file and return it, or pull the raw frames piece by piece.

        Raises:
            DisaggError: what failed it.
        """
        actor, reply, request = output.holder, output.reply, self._request
        assert actor is not None and reply is not None, "the driver's pool never holds the last stage's output"
        if request.format not in RAW:
            encoded: Encoded = await self._fleet.ask(actor, "encode", output.key, request.fps, request.format)
            return Video(data=encoded.data, encode_s=encoded.seconds)
        frames = np.empty((reply.num_frames, request.height, request.width, 3), np.float32)
        for start in range(0, reply.num_frames, frames_in_piece(request.height * request.width, reply.num_frames)):
            piece = await self._fleet.ask(actor, "piece", output.key, start)
            await self._driver_pool.pull_frames(piece, frames[start:])
        if request.format != "npy" or not reply.has_sound:
            return Video(frames=frames)
        encoded = await self._fleet.ask(actor, "encode", output.key, request.fps, "wav")
        return Video(frames=frames, sound=read_wav(encoded.data))

    def drop(self, stage: StageRun) -> None:
        """Do without a stage's output: the driver's copy replaces it, or it has to be computed again."""
        assert stage.output is not None
        self._release(stage.output)
        stage.output = stage.copy
        if stage.copy is not None:
            return
        if stage.copying is not None and stage.copy_key is not None:
            self._driver_pool.give_up(stage.copy_key)
        for consumer in (self._stages[name] for name in self._graph.consumers(stage.name)):
            if consumer.computing and consumer.attempt and consumer.attempt.actor is None:  # it only waits
                consumer.computing.cancel()
                consumer.computing = None

    def drop_all_of(self, actor: Actor) -> None:
        """Do without the outputs of a replica that is gone."""
        for stage in self._stages.values():
            if stage.output is not None and stage.output.holder is actor:
                self.drop(stage)

    def count_failed_pull(self, consumer: StageRun, error: TransferError) -> None:
        """Drop the input that did not arrive if the driver has a copy, or at its second failure."""
        for producer in (self._stages[name] for name in self._graph.producers(consumer.name)):
            output = producer.output
            if output is None or output.holder is None:
                continue
            if error.session in {session.name for session in output.handoff.sessions}:
                output.num_failed_pulls += 1
                if producer.copy is not None or output.num_failed_pulls > 1:
                    self.drop(producer)

    def release_used(self) -> None:
        """Release outputs that no consumer can need again.

        Latents and the inputs of the last stage stay until the end, and inputs of the latents until the driver has its
        copy of them.
        """
        last, kept = self._graph.last, self._graph.kept
        for stage in self._stages.values():
            consumers = [self._stages[name] for name in self._graph.consumers(stage.name)]
            if stage.output is None or not consumers or stage.name == kept or self._stages[last] in consumers:
                continue
            if all((c.copy if c.name == kept else c.output) is not None for c in consumers):
                self._release(stage.output)
                stage.output = None

    def _release(self, output: Output) -> None:
        if output.holder is None:
            self._driver_pool.release(output.key)
        else:
            self._fleet.send(output.holder, "release", output.key)

    async def close(self) -> None:
        """Cancel what computes and copies, and release every slot; one that is being written out stays until then.

        A copy of latents for their file arrives first: the next run of the request starts from them.
        """
        try:
            if self._latents_file is not None and any(stage.copying for stage in self._stages.values()):
                with suppress(TimeoutError):
                    async with asyncio.timeout(COPY_S):
                        await self._copied.wait()
        finally:
            await self._release_all()

    async def _release_all(self) -> None:
        tasks: list[asyncio.Future[None]] = [task for stage in self._stages.values() for task in stage.tasks]
        for task in tasks:
            task.cancel()
        for stage in self._stages.values():
            if stage.output is not None and stage.output.holder is not None:
                self._release(stage.output)
        if self._saving is None:
            self._release_own()
        else:
            self._saving.add_done_callback(self._release_own)
            tasks.append(asyncio.shield(self._saving))
        await asyncio.gather(*tasks, return_exceptions=True)

    def _release_own(self, _: object = None) -> None:
        for key in self._keys:
            self._driver_pool.release(key)

    def _log(self, message: str, *args: object) -> None:
        logger.info(f"request %s: {message}", self._request.id, *args, extra={"request_id": self._request.id})
