"""Many requests from a file, their videos into a folder; run again, it goes on where it was."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

from disagg_ray.batch.manifest import Folder, sha256_of, stat_of
from disagg_ray.batch.records import Picture, Record
from disagg_ray.batch.requests_file import IMAGES, Line, RequestsFile
from disagg_ray.batch.resume import Options, Plan, make_plan, picture_of
from disagg_ray.batch.summary import Summary, Tally
from disagg_ray.config.schema import Config
from disagg_ray.driver.handle import Handle
from disagg_ray.driver.signals import until, wait_for
from disagg_ray.errors import Cancelled, DisaggError, OutputError, ReplicaLost, RequestError, StartError
from disagg_ray.media.output import try_folder
from disagg_ray.pipeline import Pipeline
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import Result, rescued
from disagg_ray.service.client import Connection

logger = logging.getLogger("disagg_ray")

NUM_WRITERS = 4
"""Threads that write, hash and record while others are generated."""
GONE = (StartError, ReplicaLost, Cancelled)
"""A stage has no replica left, a service's supervisor did not come back, or it was taken down."""
SETTLE_S = 10.0
"""How long a stopped run waits for its last files to be written."""


def generate(
    options: Options, config: Config, start: Callable[[int], AbstractContextManager[Pipeline | Connection]]
) -> Summary:
    """Make what is missing; print how it ended. `start` is called with how many that are, if any.

    Raises:
        RequestError: some lines cannot be used; all of them are named.
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
    """One run over what is pending; a request is dispatched, generated, written, recorded, and forgotten."""

    def __init__(self, source: RequestsFile, folder: Folder, plan: Plan, config: Config) -> None:
        self.plan = plan
        self._source, self._folder = source, folder
        self._tally = Tally()
        self._failed = 0
        self._fatal: Exception | None = None
        self._replicas: dict[str, int] = {}
        self._seconds = 0.0
        self._ended = False
        self._note_written: Callable[[float], None] = lambda _: None
        """Has the pipeline's metrics count the seconds that a file took."""
        self._limit = 2 * config.max_in_flight
        self._in_flight = 0
        self._changed = threading.Condition()
        """Of what writers count: `_in_flight`, `_tally`, `_failed` and `_fatal`."""
        self._writers = ThreadPoolExecutor(NUM_WRITERS, "disagg_ray-writer")

    def summary(self) -> Summary:
        """Return how it went so far."""
        done, plan = self._tally.done, self.plan
        return Summary(
            done, plan.num_done, self._failed + plan.num_failed, plan.num_invalid,
            len(plan.pending) - done - self._failed, self._tally.retried, self._seconds,
            self._tally.shares(self._replicas, self._seconds), str(self._fatal) if self._fatal else None,
        )  # fmt: skip

    def run(self, pipeline: Pipeline | Connection) -> None:
        """Make all that is pending; ends early, with the reason in the summary, when the folder or the file is gone.

        Ctrl-C and SIGTERM, which raise here, give what runs `failures.shutdown_grace_s`; a second one gives nothing.
        """
        began = time.monotonic()
        self._note_written = pipeline.note_written
        self._replicas = {name: stage.num_replicas for name, stage in pipeline.config.stages.items()}
        try:
            self._dispatch(pipeline)
            with self._changed:
                until(self._changed, lambda: self._fatal or not self._in_flight)
            if self._fatal is not None:
                self._drain(pipeline, str(self._fatal))
        except (KeyboardInterrupt, SystemExit):
            self._drain(pipeline, "told to stop")
            raise
        finally:
            self._seconds = time.monotonic() - began
            self._ended = True
            self._writers.shutdown(cancel_futures=True)
        if self._fatal is not None and not isinstance(self._fatal, OSError | DisaggError):
            raise self._fatal

    def _dispatch(self, pipeline: Pipeline | Connection) -> None:
        """Submit what is pending, somewhat ahead of what runs, until all is or something ends the run."""
        for index in self.plan.pending:
            with self._changed:
                until(self._changed, lambda: self._fatal or self._in_flight < self._limit)
            if self._fatal is not None:
                return
            try:
                line = self._source.line(int(index))
                self._submit(pipeline, line)
            except (RequestError, *GONE) as error:  # the file was changed, or nobody is left to ask
                self._fatal = error

    def _submit(self, pipeline: Pipeline | Connection, line: Line) -> None:
        latents_file = self._folder.latents_of(line.request.id)
        files = {name: path for name in IMAGES if isinstance(path := getattr(line.request, name), Path)}
        seen = {name: picture for name, path in files.items() if (picture := picture_of(path, ""))}
        outcome: Handle | RequestError
        try:
            outcome = pipeline.submit(line.request, latents_file=latents_file)
            line = replace(line, pictures=_known(seen, outcome.request))
        except RequestError as error:  # its image, which is opened only now
            outcome = error
        with self._changed:
            self._in_flight += 1
        if isinstance(outcome, Handle):
            outcome.add_done_callback(partial(self._finished, line))
        else:
            self._writers.submit(self._finish, line, outcome)

    def _finished(self, line: Line, handle: Handle) -> None:
        """Go on in a thread that may wait for the disk; this one is the pipeline's."""
        if not self._ended:
            self._writers.submit(self._finish, line, handle)

    def _finish(self, line: Line, outcome: Handle | RequestError) -> None:
        """Write and record one request; what cannot be recorded ends the run."""
        try:
            record = self._record(line, outcome)
            if record is not None:
                self._folder.append(record)
                self._count(line, record)
        except Exception as error:  # noqa: BLE001 - the end of a thread: `run` tells or raises it
            self._fatal = self._fatal or error
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def _record(self, line: Line, outcome: Handle | RequestError) -> Record | None:
        """Write one request's video and return what the manifest is to say; None: it was given up with the run.

        Raises:
            OSError: the folder is gone.
            DisaggError: it cannot be written, or no replica is left.
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
            if disk or isinstance(error, GONE):  # not this request's fault
                raise
            return record("failed", error=str(error))
        written = stat_of(path)
        if written is None:
            raise FileNotFoundError(f"No such file: {str(path)!r} is gone")
        return record(
            "done", file=path.name, size=written.size, mtime_ns=written.mtime_ns, sha256=sha256_of(path),
            seconds=result.seconds, stages=result.stages, pictures=line.pictures,
        )  # fmt: skip

    def _count(self, line: Line, record: Record) -> None:
        """Count what is on disk, and let go of what was kept in case it would not get there."""
        with self._changed:
            if record.status == "done":
                self._tally.add(record.stages)
            else:
                self._failed += 1
            finished = self._tally.done + self._failed
        level = logging.DEBUG if record.status == "done" else logging.WARNING  # the progress shows what is done
        told = record.error or "done", finished, len(self.plan.pending)
        logger.log(level, "request %s: %s, %d of %d", record.id, *told, extra={"request_id": record.id})
        if record.status == "done":
            self._folder.latents_of(line.request.id).unlink(missing_ok=True)

    def _drain(self, pipeline: Pipeline | Connection, reason: str) -> None:
        grace_s = pipeline.config.failures.shutdown_grace_s

        def drain() -> None:
            logger.warning("stopping: %s; what runs gets %g s", reason, grace_s)
            pipeline.drain(grace_s)
            with self._changed:
                self._changed.wait_for(lambda: not self._in_flight, SETTLE_S)

        wait_for(drain)


def _known(seen: Mapping[str, Picture], request: ResolvedRequest) -> dict[str, Picture]:
    """Return image files as they were before they were read, with what was read."""
    return {name: replace(picture, sha256=request.images[name].sha256) for name, picture in seen.items()}


def save(result: Result, path: Path, folder: Folder) -> None:
    """Write a video into a batch's folder; what that does not take is written elsewhere, unless its latents are kept.

    Raises:
        OSError: the folder is gone.
        OutputError: it cannot be written; says where it is.
    """
    try:
        folder.check()
        if path.is_symlink():
            path.unlink()  # the folder is the batch's, what the link points to is not
        result.save(path)
    except (OSError, OutputError) as error:
        if folder.latents_of(result.request.id).exists():
            raise
        raise OutputError(f"{error}; {rescued(result)}") from (error.__cause__ or error)
