"""What is done about jobs that no request asks for, again and again until the process ends."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from functools import partial

from disagg_ray.config.deployment import ServiceConfig
from disagg_ray.errors import OutputError
from disagg_ray.http.clock import steady_now
from disagg_ray.http.files import Folder
from disagg_ray.http.metrics import Metrics
from disagg_ray.http.queues import Queues
from disagg_ray.http.repeat import repeat
from disagg_ray.http.runner import Runner, end_of
from disagg_ray.http.store import ENDED, UNFINISHED, Job, Store
from disagg_ray.http.uploads import Uploads

EVERY_S = 0.5


class Upkeep:
    """Tends jobs on one thread and frees files on another: storage that fails or hangs delays no deadline."""

    def __init__(
        self, service: ServiceConfig, store: Store, folder: Folder, uploads: Uploads, runners: Mapping[str, Runner],
        queues: Queues, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._service, self._store, self._folder, self._metrics = service, store, folder, metrics
        self._uploads, self._runners, self._queues, self._workers = uploads, runners, queues, store.workers
        self._abandoned = deque[str]()
        """Jobs to cancel."""
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=repeat, args=(what, call, lambda: EVERY_S, self._closing), daemon=True)
            for what, call in (("tending jobs", self.tend), ("freeing files", self.free))
        ]

    def start(self) -> None:
        """Go on with what was left unfinished."""
        self._resume(self._queues.read())
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def abandon(self, job: Job) -> None:
        """Cancel a job soon that nobody waits for any more; returns at once, and may be called on an event loop."""
        self._abandoned.append(job.id)

    def tend(self) -> None:
        """Write progress, end jobs that are late or cancelled, take over those of dead processes."""
        self._metrics.flush()
        while self._abandoned:
            self._store.change(self._abandoned[0], UNFINISHED, status="cancelling")
            self._abandoned.popleft()
        self._workers.keep()
        for runner in self._runners.values():
            runner.flush()
        here = {job_id: runner for runner in self._runners.values() for job_id in runner.job_ids()}
        unfinished = self._queues.read()  # after `here`: a job's row is there before it runs
        for job_id in here.keys() - {job.id for job in unfinished}:
            here[job_id].cancel(job_id)  # another process deleted or ended it
        for job in unfinished:
            if job.worker in self._workers.numbers:
                self._end_if_due(job)
        self._resume(unfinished)
        self._store.forget_deleted(time.time())
        self._metrics.queue({model: sum(job.model == model for job in unfinished) for model in self._runners})

    def _end_if_due(self, job: Job) -> None:
        runner = self._runners.get(job.model)
        if runner is None:  # it is served no more
            if job.status == "cancelling":
                ended = end_of(job, "cancelled", self._service.expires_after_s)
                self._store.change(job.id, ("cancelling",), **ended)
            return
        limit_s = runner.config.cluster.start_timeout_s
        if job.deadline_at is not None and steady_now() > job.deadline_at:
            runner.fail_late(job, "deadline_exceeded", "not finished within deadline_s")
        elif runner.link.lost_s > limit_s:
            runner.fail_late(job, "service_lost", f"the service has been away for {limit_s:g} s")
        elif job.status == "cancelling":
            runner.cancel(job.id)

    def _resume(self, unfinished: list[Job]) -> None:
        """Run what workers of our numbers left; take numbers over whose process is gone."""
        served = [job for job in unfinished if job.model in self._runners]
        ours = {number for number in {job.worker for job in served} if self._workers.take(number)}
        for job in served:
            if job.worker in ours:
                self._runners[job.model].run(job)

    def free(self) -> None:
        """Remove files that are not to stay; one that cannot be removed keeps no other.

        Raises:
            OutputError: the first that could not be; it is tried again at the next call.
        """
        failures, now = list[OutputError](), steady_now()
        removals = [partial(self._expire, job, now) for job in self._store.expired(now, self._service.max_bytes)]
        removals += [partial(self._uploads.give_up, job_id) for job_id in self._uploads.left()]
        for remove in removals:
            try:
                remove()
            except OutputError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _expire(self, job: Job, now: float) -> None:
        self._folder.remove_all_of(job)  # first: what fails is tried again; a full disk gets room for the row
        self._store.change(job.id, ENDED, num_bytes=0, expires_at=min(job.expires_at or now, now))
        self._folder.remove_all_of(job)  # a thumbnail made meanwhile
