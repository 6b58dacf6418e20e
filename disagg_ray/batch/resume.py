"""What of a file of requests is still to be made, by the manifest of the folder.

Of a request that the manifest knows:

- done, its file as it was written (size and time of change; with `verify` size and digest): left alone
- done, its file gone or changed: made again
- done, its file as it was, and its line now asks for something else, or its image file holds another picture: a bad
  line, for nothing is overwritten unasked; give it a new id, or remove the video
- failed: left alone, unless `retry_failed` or its line was changed
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from disagg_ray.batch.manifest import INVALID, Folder, read_manifest, sha256_of, stat_of
from disagg_ray.batch.records import Picture, Record
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.config.schema import Config
from disagg_ray.errors import OutputError, RequestError
from disagg_ray.media.video import digest_pixels, load_image
from disagg_ray.models.identity import identify_setup
from disagg_ray.request import Request

logger = logging.getLogger("disagg_ray")

MAX_SHOWN = 50
"""Bad lines that are printed; all of them stand in the folder's invalid.jsonl."""

NEW, DONE, FAILED, CHANGED = range(4)


@dataclass(frozen=True)
class Options:
    """What `disagg-ray generate --requests` was asked to do."""

    requests: Path
    output_dir: Path
    verify: bool = False
    """Tell by its digest, not by its time of change, whether a file is as it was written."""
    retry_failed: bool = False
    """Try again what failed in an earlier run."""
    skip_invalid: bool = False
    """Go on without the lines that cannot be used."""


@dataclass(frozen=True)
class Plan:
    """What is to be made, and what is not."""

    pending: np.ndarray[Any, np.dtype[np.int64]]
    """Indices into the requests file, in its order."""
    num_done: int
    num_failed: int
    num_invalid: int
    setup: str
    """Digest of all that besides their requests decides the videos."""


def make_plan(source: RequestsFile, folder: Folder, config: Config, options: Options) -> Plan:
    """Check every line of the file, and find out what is done.

    Raises:
        RequestError: bad lines, without `skip_invalid`, or no good one.
        OutputError: the folder cannot be written.
    """
    began, setup = time.monotonic(), identify_setup(config)
    try:
        with Problems(source.path, folder.path / INVALID) as problems:
            source.scan(problems.report)
            states = _states(source, folder, config, setup, verify=options.verify)
            for index in np.flatnonzero(states == CHANGED):
                name = source.line(int(index)).request.id
                problems.report(
                    source.number(int(index)),
                    f"id: {name!r}: its video was made from another request or picture; give another id, or remove it",
                )
    except OSError as error:
        raise OutputError(f"output-dir: {str(folder.path)!r} cannot be written: {error}") from error
    if problems.count and not options.skip_invalid:
        raise RequestError(
            f"requests: {problems.count} lines of {str(source.path)!r} cannot be used; {folder.path / INVALID} names "
            f"all of them; mend them, or give --skip-invalid"
        )
    if not len(source):
        raise RequestError(f"requests: {str(source.path)!r} holds no request; write one JSON object a line")
    wanted = (states == NEW) | ((states == FAILED) & options.retry_failed)
    plan = Plan(
        np.flatnonzero(wanted), int((states == DONE).sum()), int((states == FAILED).sum()) * (not options.retry_failed),
        problems.count, setup,
    )  # fmt: skip
    logger.info(
        "%s: %d to make, %d done, %d failed before, %d invalid; checked in %.1f s",
        source.path, len(plan.pending), plan.num_done, plan.num_failed, plan.num_invalid, time.monotonic() - began,
    )  # fmt: skip
    return plan


def _states(
    source: RequestsFile, folder: Folder, config: Config, setup: str, *, verify: bool
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return for each line of the file what the manifest says of it, one byte each."""
    states = np.full(len(source), NEW, np.uint8)
    others = np.zeros(len(source), np.bool_)
    for record in read_manifest(folder.path, brief=True):
        index = source.find(record.id)
        if index is None:
            alike = source.find_alike(record.id)  # its file would be this one's where names fold
            if alike is not None and record.status == "done" and _is_intact(folder.path, record, verify=verify):
                states[alike] = CHANGED
            continue
        same = record.content == source.content(index)
        if record.status != "done":
            states[index] = FAILED if same else NEW
        elif _is_intact(folder.path, record, verify=verify):
            same = same and not (record.pictures and _shows_another(source.line(index).request, record, config))
            states[index] = DONE if same else CHANGED
            others[index] = record.setup != setup
        else:
            states[index] = NEW
    if num_others := int((others & (states == DONE)).sum()):
        logger.warning("%d videos were made with another model, weights, options or defaults; they stay", num_others)
    return states


def _is_intact(folder: Path, record: Record, *, verify: bool) -> bool:
    assert record.file is not None, "`parse` holds every done one to it"
    path = folder / record.file
    found = stat_of(path)
    if found is None or found.size != record.size:
        return False
    return sha256_of(path) == record.sha256 if verify else found.mtime_ns == record.mtime_ns


def _shows_another(request: Request, record: Record, config: Config) -> bool:
    """Return whether an image file holds another picture than the video was made from; only changed files are read."""
    for name, before in record.pictures.items():
        path = getattr(request, name, None)
        if not isinstance(path, Path) or picture_of(path, before.sha256) in (None, before):
            continue
        try:
            if digest_pixels(load_image(path, name, config.limits.max_image_pixels)) != before.sha256:
                return True
        except RequestError as error:
            logger.warning("request %s: its video stays: %s", record.id, error)
    return False


def picture_of(path: Path, sha256: str) -> Picture | None:
    """Return an image file as it is now, with the digest of its pixels; None: it is gone."""
    try:
        state = path.stat()
    except OSError:
        return None
    return Picture(state.st_size, state.st_mtime_ns, sha256)


class Problems:
    """The bad lines: the first ones in the log, all of them in a file that is there only when there is one."""

    def __init__(self, source: Path, path: Path) -> None:
        self.count = 0
        self._source = source
        self._path = path
        self._sink: IO[str] | None = None

    def __enter__(self) -> Problems:
        self._path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink is not None:
            self._sink.close()
        if self.count > MAX_SHOWN:
            logger.warning("%s: and %d bad lines more", self._source, self.count - MAX_SHOWN)

    def report(self, number: int, fault: str) -> None:
        """Note one bad line."""
        self.count += 1
        if self.count <= MAX_SHOWN:
            logger.warning("%s:%d: %s", self._source, number, fault[:300])
        if self._sink is None:
            self._sink = self._path.open("x")
        self._sink.write(json.dumps({"line": number, "error": fault}) + "\n")
