"""Runs a batch: many requests from a file, their videos into a folder; a second run resumes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from disagg_ray.batch.manifest import Folder, sound_beside, state_of
from disagg_ray.batch.records import Record
from disagg_ray.batch.request_line import Line, files_of
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.batch.resume import Options, Plan, make_plan, picture_of
from disagg_ray.batch.summary import Summary, Tally
from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.signals import Answer
from disagg_ray.errors import (
    Cancelled,
    DisaggError,
    OutputError,
    ReplicaLost,
    RequestError,
    RequestInFlight,
    StartError,
)  # fmt: skip
from disagg_ray.media.places import try_folder
from disagg_ray.pipeline import Pipeline
from disagg_ray.result import Result, rescued
from disagg_ray.service.client import Connection

logger = logging.getLogger("disagg_ray")

NUM_WRITERS = 4
"""Threads that write, hash and record videos while others are generated."""
UNAVAILABLE = (StartError, ReplicaLost, Cancelled)
"""A stage has no replica left, a service's supervisor did not come back, or the service was taken down."""
SETTLE_S = 10.0
"""How long a stopped run waits for its last files to be written."""
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
        """Guards what writers change: `_in_flight`, `_tally` and `_fatal`."""
        self._changed: Answer[None] = Answer()
        """Set, and replaced by a new one, whenever a writer has finished a request."""
        self._writers = ThreadPoolExecutor(NUM_WRITERS, "disagg_ray-writer")

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
            self._ended = True
            self._writers.shutdown(cancel_futures=True)
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
            outcome.add_done_callback(partial(self._start_finish, line))
        else:
            self._start_finish(line, outcome)
        return True

    def _start_finish(self, line: Line, outcome: Handle | RequestError) -> None:
        """Continue on a thread that may wait for the disk."""
        if not self._ended:
            self._writers.submit(self._finish, line, outcome)

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
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                if is_so():
                    return
                changed = self._changed
            if not changed.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return


def save(result: Result, path: Path, folder: Folder) -> None:
    """Write a video into a batch's folder; if that fails and its latents are not kept, save it elsewhere.

    Raises:
        OSError: the folder is gone.
        OutputError: it cannot be written; says where it was saved.
    """
    try:
        folder.check()
        for file in (path, *([sound_beside(path)] if result.sound else [])):
            if file.is_symlink():
                file.unlink()  # the folder is the batch's, the link's target is not
        result.save(path)
    except (OSError, OutputError) as error:
        if folder.latents_of(result.request.id).exists():
            raise
        raise OutputError(f"{error}; {rescued(result)}") from (error.__cause__ or error)
