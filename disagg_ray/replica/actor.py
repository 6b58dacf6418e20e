"""What runs inside an actor: a stage, its pool, and the calls the driver makes.

A plain class: `placement` applies `ray.remote` where it launches one. Four kinds of threads enter it, each Ray's own
concurrency group: one computes (`run`), two pull inputs (`prefetch`), one encodes files, two answer control calls.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import psutil
import ray
import torch

from disagg_ray.config.schema import Config
from disagg_ray.errors import Cancelled, DisaggError, ReplicaLost, StartError
from disagg_ray.graph import FRAMES, Graph
from disagg_ray.media.video import Frames, check_writer, encode
from disagg_ray.models.identity import identify_blocks
from disagg_ray.progress.channel import Credentials, Sender
from disagg_ray.progress.events import Event, State
from disagg_ray.replica.activity import Activities
from disagg_ray.replica.messages import (
    Description,
    DriverInfo,
    Encoded,
    Health,
    ReplicaInfo,
    ReplicaState,
    Reply,
    Spec,
    Task,
)
from disagg_ray.replica.once import Once
from disagg_ray.replica.sizing import MAX_VIDEOS, frames_in_piece, pool_bytes
from disagg_ray.replica.software import software
from disagg_ray.replica.stage import Stage
from disagg_ray.result import StageTiming
from disagg_ray.scheduling.blame import poisons
from disagg_ray.text import printable
from disagg_ray.transfer.allocator import grow_segments
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool

T = TypeVar("T")

LAST_WORDS_S = 2.0
"""What a poisoned process gets to tell its driver, which ends it sooner."""

READS_EACH = 2
"""Times Mooncake may be given `transport.timeout_s` for one tensor, and to reach its peer."""


@dataclass(frozen=True)
class _Pulled:
    tensors: dict[str, torch.Tensor]
    seconds: float


class Replica:
    """One actor of a stage."""

    def __init__(self, stage: str, index: int, config: Config) -> None:
        self.name = f"{stage}-{index}"
        self._config = config
        with _imports_kept():
            self._stage = Stage(stage, config)
        self._pulled: dict[AttemptKey, _Pulled] = {}
        self._frames: dict[AttemptKey, Frames] = {}
        self._known: set[AttemptKey] = set()
        """Tasks that were begun here and not released."""
        self._changed = threading.Condition()
        """Of the three above, and of the driver_info."""
        self._driver_info: DriverInfo | None = None
        """None: whoever asks is served."""
        self._spec: Spec | None = None
        self._info: ReplicaInfo | None = None
        self._loading = False
        """Or done with that."""
        self._activities = Activities()
        self._pool: Pool

    def __repr__(self) -> str:  # Ray prefixes log lines and lists actors with it
        return self.name

    def describe(self) -> Description:
        return Description(self._stage.ports, self._stage.geometry, software())

    def load(
        self,
        graph: Graph,
        credentials: Credentials | None = None,
        taken: frozenset[str] = frozenset(),
        host: str | None = None,
    ) -> ReplicaInfo:
        """Allocate and register the pool, then load the weights.

        `credentials` are for telling of progress; `taken` are names that no session of the pool may have.

        Raises:
            ConfigError: `transport.pool_bytes` is too small for the largest request within `limits`.
            CheckpointError: a component cannot be loaded.
            EncodeError: no video file can be made here.
        """
        began = time.monotonic()
        self._loading = True
        if FRAMES in self._stage.ports.outputs:
            check_writer("mp4")
        host = host or ray.util.get_node_ip_address()
        if self._stage.device == "cuda":
            grow_segments()
        self._sender = Sender(credentials)
        self._stage.connect(graph)
        transport, device, cache_bytes = self._config.transport, self._stage.device, self._stage.cache_bytes
        nbytes = pool_bytes(self._config, self._stage)
        self._pool = Pool(self.name, nbytes, host, transport, device, cache_bytes, taken)
        self._stage.use_cache(self._pool.cache)
        blocks = identify_blocks(self._config, self._stage.name, self._stage.folder)  # of files as they are read now
        self._stage.load()
        pid = psutil.Process().pid
        self._info = ReplicaInfo(
            name=self.name,
            stage=self._stage.name,
            host=host,
            pid=pid,
            device=device,
            pool_bytes=self._pool.capacity,
            weights=self._stage.weights,
            sessions=tuple(session.name for session in self._pool.sessions),
            load_s=time.monotonic() - began,
            ready=time.time(),
            blocks=blocks,
        )
        return self._info

    def state(self) -> ReplicaState:
        """Tell a new driver what is known here."""
        return ReplicaState(self._spec, self._config, self.describe(), self._info, fresh=not self._loading)

    def follow(self, driver_info: DriverInfo, spec: Spec) -> None:
        """Work for this driver from now on; what was begun for one that is dead is given up and its slots are freed."""
        with self._changed:
            before, self._driver_info, self._spec = self._driver_info, driver_info, spec
            known = list(self._known)
        if before is not None and before.driver_epoch == driver_info.driver_epoch:
            return
        for key in known:
            self.release(key)
        if before is not None:
            self.forget(before.sessions)
        self._sender.close()
        self._sender = Sender(driver_info.credentials)

    def prefetch(self, task: Task) -> None:
        """Reserve room for a task and pull its inputs, while another computes."""
        pulled = self._pull(task)
        with self._changed:
            self._pulled[task.key] = pulled
        if self._pool.is_released(task.key):
            self.release(task.key)

    def run(self, task: Task) -> Reply:
        """Compute a task and publish its outputs.

        Raises:
            Cancelled: the task was released meanwhile; a denoise stops within one step.
            TransferError: its inputs could not be pulled.
        """
        with self._changed:
            pulled = self._pulled.pop(task.key, None)
        if pulled is None:
            pulled = self._pull(task)
        try:
            self._await_room_for_frames(task.key)
            return self._compute(task, pulled)
        except BaseException:
            self.release(task.key)
            raise

    def _await_room_for_frames(self, key: AttemptKey) -> None:
        """Wait while as many videos as may wait for their encoding do; they take the host's memory.

        An encode that hangs ends with the replica; so does this wait.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._frames) < MAX_VIDEOS or self._pool.is_released(key))

    def _tell(self, task: Task, state: State, step: int = 0, steps: int = 0) -> None:
        stage = self._stage.name
        self._sender.send(Event(task.request.id, stage, self.name, task.attempt, state, step, steps))

    def _pull(self, task: Task) -> _Pulled:
        started = time.monotonic()
        with self._changed:
            if self._driver_info is not None and self._driver_info.driver_epoch != task.driver_epoch:
                raise Cancelled(f"request {task.request.id} was a dead driver's")
            self._known.add(task.key)
        self._tell(task, "pulling")
        wanted = {h: [t for t in h.tensors if t.name in self._stage.ports.inputs] for h in task.handoffs}
        sizes = {t.name: t.spec.nbytes for metas in wanted.values() for t in metas}
        try:
            self._reserve(task.key, sizes | self._stage.output_bytes(task.request))
            tensors: dict[str, torch.Tensor] = {}
            for handoff, metas in wanted.items():
                tensors |= self._read(task.key, handoff, [meta.name for meta in metas])
        except BaseException:
            self.release(task.key)
            raise
        return _Pulled(tensors, time.monotonic() - started)

    def _reserve(self, key: AttemptKey, sizes: dict[str, int]) -> None:
        """Wait for room, which others make; it is a hang only if they no longer could."""
        pool = self._pool
        with self._activities.working("reserve", lambda: time.monotonic() if pool.can_hold(sizes) else 0.0):
            pool.reserve(key, sizes)

    def _read(self, key: AttemptKey, handoff: Handoff, names: list[str]) -> dict[str, torch.Tensor]:
        """Pull tensors; a peer that hangs is no hang of this replica, until every deadline of the read is past."""
        ends = time.monotonic() + READS_EACH * (1 + len(names)) * self._config.transport.timeout_s
        with self._activities.working("pull", lambda: ends):
            return self._pool.pull(key, handoff, names)

    def _compute(self, task: Task, pulled: _Pulled) -> Reply:
        request = task.request

        def stop_when_released(step: int, steps: int) -> None:
            activity.progress()
            self._tell(task, "running", step, steps)
            if self._pool.is_released(task.key):
                raise Cancelled(f"request {request.id} was given up at step {step} of {steps}")

        began, started = time.time(), time.monotonic()
        self._tell(task, "running")
        with self._activities.working("compute", lambda: self._stage.lock_wait_until) as activity:
            outputs = self._stage.compute(request, pulled.tensors, stop_when_released)
        computed = time.monotonic()
        self._tell(task, "publishing")
        handoff = self._publish(task.key, outputs.tensors)
        self._pool.release(task.key, pulled.tensors)
        if outputs.frames is not None:
            with self._changed:
                self._frames[task.key] = outputs.frames
        if self._pool.is_released(task.key):  # since it was published: nobody will fetch it
            raise Cancelled(f"request {request.id} was given up when it was done")
        timing = StageTiming(
            stage=self._stage.name,
            replica=self.name,
            queue_s=0.0,  # the driver knows
            pull_s=pulled.seconds,
            started=began,
            compute_s=computed - started,
            publish_s=time.monotonic() - computed,
            pulled_bytes=sum(tensor.nbytes for tensor in pulled.tensors.values()),
            route=self._pool.route(task.handoffs[0]) if task.handoffs else "none",
            peak_bytes=self._stage.peak_bytes,
        )
        return Reply(handoff, 0 if outputs.frames is None else len(outputs.frames), timing)

    def _publish(self, key: AttemptKey, tensors: dict[str, torch.Tensor]) -> Handoff:
        with self._activities.working("publish"):
            return self._pool.publish(key, tensors)

    def encode(self, key: AttemptKey, fps: int, format: str) -> Encoded:
        """Return the video file of a finished task's frames; the replica may compute the next one meanwhile."""
        began = time.monotonic()
        with self._changed:
            frames = self._frames[key]
        scale, stall_s = self._config.output.scale, self._config.failures.stall_s
        with self._activities.working("encode") as activity:
            data = encode(frames, fps, format, scale, timeout_s=stall_s, on_frame=activity.progress)
        self._drop_frames(key)
        return Encoded(data, time.monotonic() - began)

    def _drop_frames(self, key: AttemptKey) -> None:
        with self._changed:
            self._frames.pop(key, None)
            self._changed.notify_all()

    def piece(self, key: AttemptKey, start: int) -> Handoff:
        """Publish the raw frames of a finished task from frame `start` on, as many as travel at once."""
        with self._changed:
            frames = self._frames[key]
        _, height, width, _ = frames.shape
        stop = start + frames_in_piece(height * width, len(frames))
        return self._publish(key, {FRAMES: torch.from_numpy(frames[start:stop])})

    def release(self, key: AttemptKey) -> None:
        """Give a task up or forget its outputs: frees its slots, stops it if it runs. Idempotent."""
        self._pool.release(key)
        with self._changed:
            self._pulled.pop(key, None)
            self._known.discard(key)
        self._drop_frames(key)

    def health(self) -> Health:
        rss = psutil.Process().memory_info().rss
        pool = self._pool
        return Health(
            bytes_in_use=pool.bytes_in_use,
            bytes_quarantined=pool.bytes_quarantined,
            pool_bytes=pool.capacity,
            rss_bytes=rss,
            stalled=self._activities.stalled(),
            bytes_kept=pool.cache.bytes_kept,
            cache_hits=pool.cache.hits,
            cache_misses=pool.cache.misses,
            gpu_allocated_bytes=self._stage.allocated_bytes,
            gpu_peak_bytes=self._stage.peak_bytes,
            num_videos=len(self._frames),
        )

    def met(self) -> frozenset[str]:
        """Return the names of the sessions that were read from here."""
        return self._pool.met

    def forget(self, sessions: tuple[str, ...]) -> None:
        """Hear that the process behind these sessions is dead: what it might still have written to is free again."""
        for session in sessions:
            self._pool.forget(session)

    def close(self) -> None:
        """Give the pool back."""
        self._sender.close()
        self._pool.close()


class ServedReplica(Replica):
    """A replica whose expected errors are answers: raised, Ray would show each as a failed task.

    What its constructor raised is the answer to the first calls: Ray would end the process, with its native stack.
    After an error that poisons its process it says so, takes nothing more, and ends. What it is asked again, since its
    answer may have been lost, it does once.
    """

    _end: ReplicaLost | None = None
    """Why it ends."""
    _once: Once

    def __init__(self, stage: str, index: int, config: Config) -> None:
        self._refusal: DisaggError | None = None
        self._once = Once()
        try:
            super().__init__(stage, index, config)
        except DisaggError as error:
            self._refusal = error
        except Exception as error:  # noqa: BLE001 - the process's boundary: the driver reports it
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{at.filename}:{at.lineno}"
            self._refusal = StartError(f"{self.name}: {type(error).__name__}: {printable(str(error))} ({where})")

    def describe(self) -> Description | DisaggError:  # type: ignore[override]
        return self._refusal or super().describe()

    def load(self, *args: Any) -> ReplicaInfo | DisaggError:  # type: ignore[override]
        if self._refusal is not None:
            return self._refusal
        return self._once.answer("load", None, partial(self._answer, super().load, *args))

    def state(self) -> ReplicaState | DisaggError:  # type: ignore[override]
        return self._refusal or super().state()

    def prefetch(self, task: Task) -> DisaggError | None:  # type: ignore[override]
        return self._once.answer("prefetch", task.key, partial(self._answer, super().prefetch, task))

    def run(self, task: Task) -> Reply | DisaggError:  # type: ignore[override]
        return self._once.answer("run", task.key, partial(self._answer, super().run, task))

    def encode(self, key: AttemptKey, fps: int, format: str) -> Encoded | DisaggError:  # type: ignore[override]
        return self._once.answer("encode", key, partial(self._answer, super().encode, key, fps, format))

    def piece(self, key: AttemptKey, start: int) -> Handoff | DisaggError:  # type: ignore[override]
        return self._answer(super().piece, key, start)

    def release(self, key: AttemptKey) -> None:
        super().release(key)
        self._once.forget(key)

    def _answer(self, method: Callable[..., T], *args: Any) -> T | DisaggError:
        if self._end is not None:
            return self._end
        try:
            return method(*args)
        except (DisaggError, RuntimeError) as error:
            if poisons(error):
                said = (str(error).splitlines() or [""])[0]
                self._end = ReplicaLost(f"{self.name}: {type(error).__name__}: {said}")
                exiting = threading.Timer(LAST_WORDS_S, os._exit, (1,))
                exiting.daemon = True
                exiting.start()
                return self._end
            if isinstance(error, DisaggError):
                error.__cause__ = error.__context__ = None  # Ray drops them; here they would keep tensors alive
                return error.with_traceback(None)
            raise


@contextmanager
def _imports_kept() -> Iterator[None]:
    """Keep the garbage collector from what imports make: it is looked through many times over and never freed.

    That takes a tenth of a replica's start, and a quarter of a second at each full collection afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
