"""Runs a batch: many requests from a file, their videos into a folder; a second run resumes."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from queue import SimpleQueue

from disagg_ray.batch.manifest import Folder, save, sound_beside, state_of
from disagg_ray.batch.records import Record
from disagg_ray.batch.request_line import Line, files_of
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.batch.resume import Options, Plan, make_plan, picture_of
from disagg_ray.batch.summary import Summary, Tally
from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.signals import Answer
from disagg_ray.driver.threads import begin
from disagg_ray.errors import (
    Cancelled,
    DisaggError,
    OutputError,
    ReplicaLost,
    RequestError,
    RequestInFlight,
    StartError,
)
from disagg_ray.media.places import try_folder
from disagg_ray.pipeline import Pipeline
from disagg_ray.service.client import Connection

logger = logging.getLogger("disagg_ray")

NUM_WRITERS = 4
"""Threads that write, hash and record videos while others are generated."""
UNAVAILABLE = (StartError, ReplicaLost, Cancelled)
"""A stage has no replica left, a service's supervisor did not come back, or the service was taken down."""
SETTLE_S = 10.0
"""How long a stopped run waits for its last files to be written."""
LAST_S = 60.0
"""And for those that are then being written; a writer that hangs is left behind."""
LOOK_S, MAX_LOOKS = 10.0, 60
"""Seconds between looks at the writers while no request ends, and after how many at the same request one hangs."""
BUSY_S = 2.0
"""Between two tries of a request whose id a service still computes for an earlier run."""


def generate(
    options: Options, config: Config, start: Callable[[int], AbstractContextManager[Pipeline | Connection]]
) -> Summary:
    """Make what is missing and print the summary. `start` gets the number of requests; it is not called for none.

    Raises:
        RequestError: lines are invalid; the log names them.
        OutputError: the folder cannot be used.
    """
    with RequestsFile(options.requests, config) as source, Folder(options.output_dir) as folder:
        try_folder(folder.path, f"output-dir: {str(folder.path)!r}")
        batch = Batch(source, folder, make_plan(source, folder, config, options), config)
        try:
            if num_pending := len(batch.plan.pending):
                with start(num_pending) as pipeline:
                    batch.run(pipeline)
        finally:
            summary = batch.summary()
            print("\n".join(summary.lines()))
        return summary


class Batch:
    """One run: each pending request is submitted, generated, written and recorded."""

    def __init__(self, source: RequestsFile, folder: Folder, plan: Plan, config: Config) -> None:
        self.plan = plan
        self._source, self._folder, self._makes = source, folder, config.model.traits.makes
        self._tally = Tally()
        self._fatal: Exception | None = None
        """What stops the run."""
        self._replicas: dict[str, int] = {}
        self._seconds = 0.0
        self._ended = False
        self._note_written: Callable[[float], None] = lambda _: None
        """Reports the seconds of writing a file to the pipeline's metrics."""
        self._limit = 2 * config.max_in_flight
        self._in_flight = 0
        self._lock = threading.Lock()
        """Guards what writers change: `_in_flight`, `_tally`, `_fatal`, and `_writing` with `_ended`."""
        self._changed: Answer[None] = Answer()
        """Set, and replaced by a new one, whenever a writer has finished a request."""
        self._finished: SimpleQueue[tuple[Line, Handle | RequestError] | None] = SimpleQueue()
        """What writers take; None ends one."""
        self._writing: dict[str, int] = {}
        """How often each request that is being written was looked at, by id."""

    def summary(self) -> Summary:
        """Return how it went so far."""
        tally, plan = self._tally, self.plan
        return Summary(
            tally.done, plan.num_done, tally.failed + plan.num_failed, plan.num_invalid,
            len(plan.pending) - tally.finished, tally.retried, self._seconds,
            tally.shares(self._replicas, self._seconds), str(self._fatal) if self._fatal else None,
            self._makes, tally.finished,
        )  # fmt: skip

    def run(self, pipeline: Pipeline | Connection) -> None:
        """Make all pending requests; stop, with the reason in the summary, if folder or requests file become unusable.

        Ctrl-C and SIGTERM raise where this waits: running requests get `failures.shutdown_grace_s`; a second ends that.
        """
        began = time.monotonic()
        if isinstance(pipeline, Pipeline):
            self._note_written = pipeline.note_written
        self._replicas = {name: stage.num_replicas for name, stage in pipeline.config.stages.items()}
        for _ in range(NUM_WRITERS):
            begin(self._write, "writer")
        try:
            self._dispatch(pipeline)
            self._wait_until(lambda: bool(self._fatal) or not self._in_flight)
            if self._fatal is not None:
                self._drain(pipeline, str(self._fatal))
        except (KeyboardInterrupt, SystemExit):
            self._drain(pipeline, "interrupted")
            raise
        finally:
            self._seconds = time.monotonic() - began
            self._end_writers()
        if self._fatal is not None and not isinstance(self._fatal, OSError | DisaggError):
            raise self._fatal

    def _dispatch(self, pipeline: Pipeline | Connection) -> None:
        """Submit all pending requests, at most `_limit` at once, unless something stops the run."""
        pending = deque(map(int, self.plan.pending))
        while pending:
            self._wait_until(lambda: bool(self._fatal) or self._in_flight < self._limit)
            if self._fatal is not None:
                return
            index = pending.popleft()
            try:
                taken = self._submit(pipeline, self._source.line(index))
            except (RequestError, *UNAVAILABLE) as error:  # of the requests file: a request's own is recorded
                self._fatal = error
                return
            if not taken:
                pending.append(index)
                self._wait_until(lambda: bool(self._fatal), BUSY_S)

    def _submit(self, pipeline: Pipeline | Connection, line: Line) -> bool:
        """Submit one request, to be finished by a writer.

        Return False if a service still computes another request of its id, left by an earlier run of this batch.
        """
        states = {name: state for name, path in files_of(line.request).items() if (state := picture_of(path, ""))}
        outcome: Handle | RequestError
        try:
            outcome = pipeline.submit(line.request, latents_file=self._folder.latents_of(line.request.id))
            read = outcome.request.images
            line = replace(line, pictures={name: replace(states[name], sha256=read[name].sha256) for name in states})
        except RequestInFlight as error:
            logger.info("%s; trying again", error)
            return False
        except RequestError as error:  # its image, which is opened only now
            outcome = error
        with self._lock:
            self._in_flight += 1
        if isinstance(outcome, Handle):
            outcome.add_done_callback(lambda handle: self._finished.put((line, handle)))
        else:
            self._finished.put((line, outcome))
        return True

    def _write(self) -> None:
        """Finish one request after the other, on a writer's thread, until the run ends."""
        while (finished := self._finished.get()) is not None:
            with self._lock:
                if self._ended:
                    return
                self._writing[finished[0].request.id] = 0
            self._finish(*finished)

    def _end_writers(self) -> None:
        """Have writers begin nothing more, and wait a while for what they write."""
        with self._lock:
            self._ended = True
        for _ in range(NUM_WRITERS):
            self._finished.put(None)
        try:
            self._wait_until(lambda: not self._writing, LAST_S)
        finally:
            with self._lock:
                left = ", ".join(self._writing)
            if left:
                self._folder.keep_open()
                logger.error("not written: %s; check the disk, and run the same command again", left)

    def _finish(self, line: Line, outcome: Handle | RequestError) -> None:
        """Write and record one request, on a writer's thread; stop the run if that fails."""
        try:
            record = self._record(line, outcome)
            if record is not None:
                self._folder.append(record)
                self._count(record)
        except Exception as error:  # noqa: BLE001 - the end of a thread: `run` reports or raises it
            self._fatal = self._fatal or error
        finally:
            with self._lock:
                self._in_flight -= 1
                del self._writing[line.request.id]
                changed, self._changed = self._changed, Answer()
            changed.set_result(None)

    def _record(self, line: Line, outcome: Handle | RequestError) -> Record | None:
        """Write one request's video and return its record; None: it was cancelled with the run.

        Raises:
            OSError: the folder is gone.
            DisaggError: the video cannot be written, or no replica is left.
        """
        record = partial(Record, line.request.id, content=line.content, setup=self.plan.setup, finished=time.time())
        try:
            if isinstance(outcome, RequestError):
                raise outcome
            record = partial(record, request=outcome.request)
            result = outcome.result()
            path = self._folder.video_of(result.request.id, result.request.format)
            began = time.monotonic()
            save(result, path, self._folder)
            self._note_written(time.monotonic() - began)
        except Cancelled:
            return None
        except DisaggError as error:
            disk = isinstance(error, OutputError) and isinstance(error.__cause__, OSError)
            if disk or isinstance(error, UNAVAILABLE):  # not this request's fault
                raise
            return record("failed", error=str(error))
        if result.sound:
            beside = sound_beside(path)
            record = partial(record, sound_file=beside.name, sound=state_of(beside))
        return record(
            "done", file=path.name, **asdict(state_of(path)), seconds=result.seconds, stages=result.stages,
            pictures=line.pictures,
        )  # fmt: skip

    def _count(self, record: Record) -> None:
        """Count a request whose record is on disk, and delete its latents once it is done."""
        with self._lock:
            self._tally.add(record)
            counts = self._tally.finished, len(self.plan.pending)
        level = logging.WARNING if record.error else logging.DEBUG  # the progress display counts done ones
        about = record.id, record.error or "done", *counts
        logger.log(level, "request %s: %s, %d of %d", *about, extra={"request_id": record.id})
        if record.status == "done":
            self._folder.latents_of(record.id).unlink(missing_ok=True)

    def _drain(self, pipeline: Pipeline | Connection, reason: str) -> None:
        """Give running requests `failures.shutdown_grace_s`, then cancel them."""
        grace_s = pipeline.config.failures.shutdown_grace_s
        logger.warning("stopping: %s; running requests get %g s", reason, grace_s)
        pipeline.drain(grace_s)
        self._wait_until(lambda: not self._in_flight, SETTLE_S)

    def _wait_until(self, is_so: Callable[[], bool], timeout_s: float | None = None) -> None:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                if is_so() or time.monotonic() >= deadline:
                    return
                changed = self._changed
            if not changed.wait(max(0.0, min(LOOK_S, deadline - time.monotonic()))):
                self._look()

    def _look(self) -> None:
        """Stop the run once a writer hangs."""
        with self._lock:
            for name in self._writing:
                self._writing[name] += 1
            late = ", ".join(name for name, looks in self._writing.items() if looks > MAX_LOOKS)
            if late and self._fatal is None:
                hangs = (
                    f"output-dir: {str(self._folder.path)!r} hangs: {late} not written within {LOOK_S * MAX_LOOKS:g} s"
                )
                self._fatal = OutputError(f"{hangs}; check its disk, and run the same command again")
