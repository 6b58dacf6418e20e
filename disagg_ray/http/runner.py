"""Runs accepted jobs of one model on its service, and keeps what comes of them."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import Handle
from disagg_ray.errors import Cancelled, DisaggError, InputError, OutputError, Overloaded, ReplicaLost
from disagg_ray.http.clock import steady_now
from disagg_ray.http.files import Folder, by_field, file_of, thumbnail_of
from disagg_ray.http.link import Link
from disagg_ray.http.live import Live
from disagg_ray.http.pace import Pace
from disagg_ray.http.store import UNFINISHED, Job, Store
from disagg_ray.http.workers import UNAVAILABLE
from disagg_ray.progress.events import Event
from disagg_ray.request import Request
from disagg_ray.result import Result
from disagg_ray.service.client import Connection
from disagg_ray.text import printable

logger = logging.getLogger("disagg_ray")

RETRY_S = 1.0
"""Between two tries to submit to a service that is full, or to write to a database that does not answer."""
AGAIN = (Overloaded, Cancelled, ReplicaLost, *UNAVAILABLE)
"""What passes by itself, or with another connection."""
END_S = 2.0
"""What the thread that submits gets to end."""
MAX_TRIES = 3
"""Of a job whose service was lost."""
NUM_WRITERS = 2
"""Threads that write files."""


class Runner:
    """Takes jobs in order; what fails with the service is run again, what fails by itself fails."""

    def __init__(
        self, model: str, config: Config, worker: int, store: Store, folder: Folder, expires_after_s: float | None,
        on_first_event: Callable[[float], None],
    ) -> None:  # fmt: skip
        self.model, self.pace = model, Pace(lambda: self.config)
        self._store, self._folder, self._expires_after_s = store, folder, expires_after_s
        self._on_first_event = on_first_event
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._lives: dict[str, Live] = {}
        self._lock = threading.Lock()
        """Of `_lives` and what is in them."""
        self._tries: Counter[str] = Counter()
        self._closing = threading.Event()
        self._writers = ThreadPoolExecutor(NUM_WRITERS, f"disagg_ray-write-{model}")
        self.link = Link(model, config, worker, self._on_event, self._closing)
        if (last := store.last_completed(model)) is not None:
            self.pace.learn(last)
        self._thread = threading.Thread(target=self._submit_all, daemon=True)
        self._thread.start()

    @property
    def config(self) -> Config:
        """The service's, which a rollout changes."""
        return self.link.config

    def run(self, job: Job) -> None:
        """Have a job run; returns at once."""
        with self._lock:
            if job.id in self._lives:
                return
            self._lives[job.id] = Live(job)
        self._queue.put(job)

    def view(self, job: Job) -> Job:
        """Return a job as it is this moment, ahead of the database if it runs here."""
        with self._lock:
            live = self._lives.get(job.id)
            return live.view(job, self.pace) if live is not None else job

    def job_ids(self) -> list[str]:
        """Return the jobs that wait or run here."""
        with self._lock:
            return list(self._lives)

    def subscribe(self, job_id: str, receive: Callable[[Job], None]) -> Callable[[], None]:
        """Have `receive` called, on some thread, for every event of a job; return what ends that."""
        with self._lock:
            live = self._lives.get(job_id)
            if live is None:
                return lambda: None
            live.subscribers.add(receive)
        return lambda: live.subscribers.discard(receive)

    def cancel(self, job_id: str) -> None:
        """Cancel a job if it runs here; what becomes of it is in the database."""
        with self._lock:
            live = self._lives.get(job_id)
        if live is not None and live.handle is not None:
            live.handle.cancel()
        elif live is not None:
            self._end(live.job, "cancelled")

    def flush(self) -> None:
        """Write the progress of all jobs that have come further."""
        with self._lock:
            moved = [live for live in self._lives.values() if live.changed]
            updates = [live.view(live.job, self.pace) for live in moved]
            for live, job in zip(moved, updates, strict=True):
                live.changed, live.job = False, job
        for status in ("queued", "in_progress"):
            values = {
                job.id: {
                    "progress": job.progress,
                    "status": status,
                    "stages": job.stages,
                }
                for job in updates
                if job.status == status
            }
            if values:
                self._store.change_all(values, ("queued", status))

    def close(self, grace_s: float) -> None:
        """Give running jobs some seconds, then leave; those that are not done are run by the next process."""
        self._closing.set()
        self._queue.put(None)
        self.link.drain(grace_s)
        self._writers.shutdown()
        self.link.close()
        self._thread.join(END_S)

    def _submit_all(self) -> None:
        while (job := self._queue.get()) is not None and not self._closing.is_set():
            try:
                self._submit(job)
            except Exception as error:  # the thread must outlive a fault of one job, which says what it was
                logger.exception("job %s", job.id)
                self._until_written(job, partial(self._fail, job, "internal_error", type(error).__name__))

    def _submit(self, job: Job) -> None:
        """Submit a job, however often it takes to find the service, and room there."""
        while not self._closing.is_set():
            connection, live = self.link.connection(job.worker), self._lives.get(job.id)
            if connection is None or live is None:
                return
            try:
                if not self._is_wanted(job):
                    self._end(job, "cancelled")
                    return
                with self._folder.local(job.images) as uploads:
                    request = Request(job.prompt, id=job.id, **job.settings | by_field(uploads))
                    handle = connection.submit(request, wait=False, hold=True)
            except AGAIN as error:
                logger.info("job %s is submitted again: %s", job.id, error)
                self._closing.wait(RETRY_S)
            except DisaggError as error:
                code = "invalid_request" if isinstance(error, InputError) else "generation_failed"
                self._until_written(job, partial(self._fail, job, code, error))
                return
            else:
                live.handle = handle
                handle.add_done_callback(partial(self._on_done, job, connection))
                if self._lives.get(job.id) is not live:  # cancelled meanwhile
                    handle.cancel()
                return

    def _is_wanted(self, job: Job) -> bool:
        """Return whether a job has neither been cancelled nor deleted."""
        row = self._store.get(job.id)
        return row is not None and row.status in ("queued", "in_progress")

    def _on_event(self, event: Event) -> None:
        if not event.stage:
            return  # as a whole it is over, which its handle says
        with self._lock:
            live = self._lives.get(event.request_id)
            if live is None:
                return
            if not live.stages:
                self._on_first_event(max(0.0, time.time() - live.job.created_at))
            live.stages[event.stage] = event
            live.changed = True
            job, receivers = live.view(live.job, self.pace), list(live.subscribers)
        for receive in receivers:
            receive(job)

    def _on_done(self, job: Job, connection: Connection, handle: Handle) -> None:
        with suppress(RuntimeError):  # this has closed: the next process runs the job
            self._writers.submit(self._finish, job, connection, handle)

    def _finish(self, job: Job, connection: Connection, handle: Handle) -> None:
        """Write what became of a job; only then the service may forget it."""
        if self._until_written(job, partial(self._conclude, job, handle)):
            connection.acknowledge(job.id)

    def _until_written(self, job: Job, write: Callable[[], None]) -> bool:
        """Call `write` until the database answers; return False if this closes first: the next process runs the job."""
        while True:
            try:
                write()
                return True
            except UNAVAILABLE as error:
                logger.warning("job %s: service.database: %s", job.id, error)
            if self._closing.wait(RETRY_S):
                return False

    def _conclude(self, job: Job, handle: Handle) -> None:
        try:
            self._complete(job, handle.result())
        except UNAVAILABLE:
            raise
        except (Cancelled, ReplicaLost) as error:
            self._lose(job, error)
        except DisaggError as error:
            self._fail(job, "storage_failed" if isinstance(error, OutputError) else "generation_failed", error)
        except Exception as error:  # the thread's end, which says what it was
            logger.exception("job %s", job.id)
            self._fail(job, "internal_error", type(error).__name__)

    def _complete(self, job: Job, result: Result) -> None:
        assert result.data is not None
        self._folder.write(file_of(job), result.data)
        seconds = {timing.stage: timing.compute_s + timing.encode_s for timing in result.stages}
        num_bytes = job.num_bytes + len(result.data)
        if self._end(job, "completed", progress=100, num_bytes=num_bytes, stage_seconds=seconds):
            self.pace.learn(replace(job, stage_seconds=seconds))
        elif (row := self._store.get(job.id)) is None or row.status != "completed" or row.num_bytes == 0:
            # deleted, late or expired meanwhile
            self._folder.remove(file_of(job), thumbnail_of(job))

    def _lose(self, job: Job, error: DisaggError) -> None:
        """Run a job again that was cancelled with its service; one that somebody cancelled is over."""
        if self._closing.is_set():
            return
        if not self._is_wanted(job):
            self._end(job, "cancelled")
            return
        self._tries[job.id] += 1
        if self._tries[job.id] >= MAX_TRIES:
            self._fail(job, "service_lost", error)
        elif (live := self._lives.get(job.id)) is not None:
            logger.warning("job %s is run again: %s", job.id, error)
            live.handle = None
            self._queue.put(job)

    def _fail(self, job: Job, code: str, error: object) -> None:
        message = printable(str(error).strip().partition("\n")[0], 500)
        self._end(job, "failed", error_code=code, error_message=message)

    def _end(self, job: Job, status: str, **values: object) -> bool:
        """Write how a job ended, unless it has ended already; return whether it had not."""
        before = ("cancelling",) if status == "cancelled" else UNFINISHED
        done = self._store.change(job.id, before, **end_of(job, status, self._expires_after_s), **values)
        with self._lock:
            live = self._lives.pop(job.id, None)
        self._tries.pop(job.id, None)
        row = self._store.get(job.id)
        if live is not None and row is not None:
            for receive in list(live.subscribers):
                receive(row)
        return done

    def fail_late(self, job: Job, code: str, message: str) -> None:
        """Fail a job for a reason that is not its own run's, then cancel that: while it is wanted it is run again."""
        with self._lock:
            live = self._lives.get(job.id)
        self._fail(job, code, message)
        if live is not None and live.handle is not None:
            live.handle.cancel()


def end_of(job: Job, status: str, expires_after_s: float | None) -> dict[str, object]:
    """Return the columns of a job that ends now."""
    ended: dict[str, object] = {"status": status, "completed_at": time.time()}
    if expires_after_s is not None and (job.images or status == "completed"):
        ended["expires_at"] = steady_now() + expires_after_s
    return ended
