"""What runs inside an actor: a stage, its pool, and the calls the driver makes.

`driver.placement` launches it, as a `served.ServedReplica`. Four kinds of threads enter it, each a concurrency group of
Ray's: one computes (`run`), two pull inputs (`prefetch`), one encodes files, two answer control calls.
"""

from __future__ import annotations

import threading
import time

import psutil
import ray
import torch

from disagg_ray.config.schema import Config
from disagg_ray.errors import Cancelled
from disagg_ray.graph import FRAMES, Graph
from disagg_ray.media.video import check_writer, encode
from disagg_ray.models.identity import identify_blocks
from disagg_ray.process import imports_kept
from disagg_ray.progress.channel import Credentials, Sender
from disagg_ray.progress.events import Event, State
from disagg_ray.replica.activity import Activities
from disagg_ray.replica.computer import Computer, load
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
from disagg_ray.replica.puller import Pulled, Puller
from disagg_ray.replica.sizing import frames_in_piece, pool_bytes
from disagg_ray.replica.software import software
from disagg_ray.replica.stage import Stage
from disagg_ray.replica.videos import Videos
from disagg_ray.result import StageTiming
from disagg_ray.transfer.handoff import AttemptKey, Handoff
from disagg_ray.transfer.pool import Pool
from disagg_ray.transfer.segments import grow_segments


class Replica:
    """One actor of a stage: of its ranks, the one that the driver knows."""

    def __init__(self, stage: str, index: int, config: Config) -> None:
        self.name = f"{stage}-{index}"
        self._config = config
        with imports_kept():
            self.stage = Stage(stage, config)
        self._pulled: dict[AttemptKey, Pulled] = {}
        self._known: set[AttemptKey] = set()
        """Keys of tasks that were begun here and not released."""
        self._lock = threading.Lock()
        """Guards the two above and the driver's info."""
        self._videos = Videos()
        self._driver_info: DriverInfo | None = None
        """None: tasks of every driver are served."""
        self._spec: Spec | None = None
        self._info: ReplicaInfo | None = None
        self._loading = False
        """From the first call of `load` on."""
        self._activities = Activities()
        self.pool: Pool
        self._puller: Puller
        self._computer: Computer
        """All from `load` on."""

    def __repr__(self) -> str:  # Ray prefixes log lines and lists actors with it
        return self.name

    def describe(self) -> Description:
        return Description(self.stage.ports, self.stage.geometry, software())

    def load(
        self, graph: Graph, credentials: Credentials | None = None, taken: frozenset[str] = frozenset(), host: str = ""
    ) -> ReplicaInfo:
        """Allocate and register the pool, then load the weights.

        `credentials` are for sending progress events; `taken` are names that no session of the pool may have.

        Raises:
            ConfigError: `transport.pool_bytes` is too small for the largest request within `limits`.
            CheckpointError: a component cannot be loaded.
            EncodeError: no video file can be made here.
        """
        began = time.monotonic()
        self._loading = True
        if FRAMES in self.stage.ports.outputs:
            check_writer("mp4")
        host = host or ray.util.get_node_ip_address()
        if self.stage.device == "cuda":
            grow_segments()
        self._sender = Sender(credentials)
        self.stage.connect(graph)
        transport, device, cache_bytes = self._config.transport, self.stage.device, self.stage.cache_bytes
        nbytes = pool_bytes(self._config, self.stage)
        self.pool = Pool(self.name, nbytes, host, transport, device, cache_bytes, taken)
        self._puller = Puller(self.stage, self.pool, self._activities)
        self.stage.use_cache(self.pool.cache)
        blocks = identify_blocks(self._config, self.stage.name, self.stage.folder)  # of files as they are read now
        self._computer, ranks = load(self.name, self.stage, self._config, graph, host)
        self._info = ReplicaInfo(
            name=self.name,
            stage=self.stage.name,
            host=host,
            pid=psutil.Process().pid,
            device=device,
            pool_bytes=self.pool.capacity,
            num_rooms=self.stage.needs().num_outputs(self.pool.capacity),
            weights=self.stage.weights,
            sessions=tuple(session.name for session in self.pool.sessions),
            load_s=time.monotonic() - began,
            ready=time.time(),
            blocks=blocks,
            ranks=ranks,
        )
        return self._info

    def state(self) -> ReplicaState:
        """Return what a new driver needs to know of this replica."""
        return ReplicaState(self._spec, self._config, self.describe(), self._info, fresh=not self._loading)

    def follow(self, driver_info: DriverInfo, spec: Spec) -> None:
        """Serve this driver from now on; what was begun for one that is dead is cancelled, and its slots are freed."""
        with self._lock:
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
        with self._lock:
            self._pulled[task.key] = pulled
        if self.pool.is_released(task.key):
            self.release(task.key)

    def run(self, task: Task) -> Reply:
        """Compute a task and publish its outputs.

        Raises:
            Cancelled: the task was released meanwhile; a denoise stops within one step.
            TransferError: its inputs could not be pulled.
        """
        with self._lock:
            pulled = self._pulled.pop(task.key, None)
        if pulled is None:
            pulled = self._pull(task)
        try:
            self._videos.wait_for_room(lambda: self.pool.is_released(task.key))
            return self._compute(task, pulled)
        except BaseException:
            self.release(task.key)
            raise

    def _report(self, task: Task, state: State, step: int = 0, steps: int = 0) -> None:
        num_ranks = self._config.stages[self.stage.name].parallel.size
        steps_of = (task.attempt, state, step, steps)
        self._sender.send(Event(task.request.id, self.stage.name, self.name, *steps_of, num_ranks=num_ranks))

    def _pull(self, task: Task) -> Pulled:
        with self._lock:
            if self._driver_info is not None and self._driver_info.driver_epoch != task.driver_epoch:
                raise Cancelled(f"request {task.request.id} is of a driver that is gone")
            self._known.add(task.key)
        self._report(task, "pulling")
        try:
            return self._puller.pull(task)
        except BaseException:
            self.release(task.key)
            raise

    def _compute(self, task: Task, pulled: Pulled) -> Reply:
        request = task.request

        def stop_when_released(step: int, steps: int) -> None:
            activity.progress()
            self._report(task, "running", step, steps)
            if self.pool.is_released(task.key):
                raise Cancelled(f"request {request.id} was cancelled at step {step} of {steps}")

        began, started = time.time(), time.monotonic()
        self._report(task, "running")
        with self._activities.working("compute", lambda: self.stage.lock_wait_until) as activity:
            outputs = self._computer.compute(request, pulled.tensors, stop_when_released).checked(self.stage.name)
        computed = time.monotonic()
        self._report(task, "publishing")
        handoff = self._publish(task.key, outputs.tensors)
        self.pool.release(task.key, pulled.tensors)
        if (clip := outputs.clip) is not None:
            self._videos.add(task.key, clip)
        if self.pool.is_released(task.key):  # while it was published: no replica will fetch it
            raise Cancelled(f"request {request.id} was cancelled when it was done")
        timing = StageTiming(
            stage=self.stage.name,
            replica=self.name,
            queue_s=0.0,  # set by the driver
            pull_s=pulled.seconds,
            started=began,
            compute_s=computed - started,
            publish_s=time.monotonic() - computed,
            pulled_bytes=sum(tensor.nbytes for tensor in pulled.tensors.values()),
            route=self.pool.route(task.handoffs[0]) if task.handoffs else "none",
            peak_bytes=self.stage.peak_bytes,
        )
        return Reply(handoff, 0 if clip is None else len(clip.frames), timing, bool(clip and clip.sound))

    def _publish(self, key: AttemptKey, tensors: dict[str, torch.Tensor]) -> Handoff:
        with self._activities.working("publish"):
            return self.pool.publish(key, tensors)

    def encode(self, key: AttemptKey, fps: int, format: str) -> Encoded:
        """Return the video file of a finished task's frames; the replica may compute the next one meanwhile."""
        began = time.monotonic()
        clip, scale, stall_s = self._videos[key], self._config.output.scale, self._config.failures.stall_s
        with self._activities.working("encode") as work:
            data = encode(clip.frames, fps, format, scale, sound=clip.sound, timeout_s=stall_s, on_frame=work.progress)
        self._videos.drop(key)
        return Encoded(data, time.monotonic() - began)

    def piece(self, key: AttemptKey, start: int) -> Handoff:
        """Publish the raw frames of a finished task from frame `start` on, as many as a piece holds."""
        frames = self._videos[key].frames
        _, height, width, _ = frames.shape
        stop = start + frames_in_piece(height * width, len(frames))
        return self._publish(key, {FRAMES: torch.from_numpy(frames[start:stop])})

    def release(self, key: AttemptKey) -> None:
        """Cancel a task or drop its outputs: free its slots, stop it if it runs. Idempotent."""
        self.pool.release(key)
        with self._lock:
            self._pulled.pop(key, None)
            self._known.discard(key)
        self._videos.drop(key)

    def health(self) -> Health:
        pool = self.pool
        return Health(
            bytes_in_use=pool.bytes_in_use,
            bytes_quarantined=pool.bytes_quarantined,
            pool_bytes=pool.capacity,
            stalled=self._activities.stalled(),
            bytes_kept=pool.cache.bytes_kept,
            cache_hits=pool.cache.hits,
            cache_misses=pool.cache.misses,
            memory=self._computer.memory(),
            num_videos=len(self._videos),
        )

    def met(self) -> frozenset[str]:
        """Return the names of the sessions that were read from here."""
        return self.pool.met

    def forget(self, sessions: tuple[str, ...]) -> None:
        """Note that the process behind these sessions is dead: free what it might still have written to."""
        for session in sessions:
            self.pool.forget(session)

    def close(self) -> None:
        """Give the pool back."""
        self._sender.close()
        self.pool.close()
