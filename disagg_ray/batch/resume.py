"""Compares a file of requests with the manifest of the output folder: what has to be made.

Of a request in the manifest:

- done, and its file, and that of its sound, have the recorded size and modification time (with `verify`: size and
  digest): left alone
- done, and one of them is missing or changed: made again
- done, its file is intact, and its line or the picture in its image file changed: an invalid line, because no video is
  overwritten unasked
- failed: left alone, unless `retry_failed` is set or its line changed
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from disagg_ray.batch.lines import InvalidLines
from disagg_ray.batch.manifest import INVALID, Folder, read_manifest, sha256_of, sound_beside, stat_of
from disagg_ray.batch.records import FileState, Record
from disagg_ray.batch.request_line import files_of
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.config.schema import Config
from disagg_ray.errors import OutputError, RequestError
from disagg_ray.inputs import read_inputs
from disagg_ray.media.places import SUFFIX_OF
from disagg_ray.models.identity import identify_setup
from disagg_ray.request import Request

logger = logging.getLogger("disagg_ray")

NEW, DONE, FAILED, CHANGED = range(4)


@dataclass(frozen=True)
class Options:
    """The arguments of `disagg-ray generate --requests`."""

    requests: Path
    output_dir: Path
    verify: bool = False
    """Compare finished files by size and digest instead of modification time."""
    retry_failed: bool = False
    """Make again what failed in an earlier run."""
    skip_invalid: bool = False
    """Run without the invalid lines."""


@dataclass(frozen=True)
class Plan:
    """What to make."""

    pending: np.ndarray[Any, np.dtype[np.int64]]
    """Indices into the requests file, ascending."""
    num_done: int
    num_failed: int
    num_invalid: int
    setup: str
    """Digest of model, options and versions (`identity.identify_setup`)."""


def make_plan(source: RequestsFile, folder: Folder, config: Config, options: Options) -> Plan:
    """Check every line of the file and compare it with the manifest.

    Raises:
        RequestError: lines are invalid, without `skip_invalid`; or none is valid.
        OutputError: the folder cannot be written.
    """
    began, setup = time.monotonic(), identify_setup(config)
    try:
        with InvalidFile(source.path, folder.path / INVALID) as invalid:
            source.scan(invalid.report)
            states = _states(source, folder.path, config, setup, verify=options.verify)
            for index in map(int, np.flatnonzero(states == CHANGED)):
                name = source.line(index).request.id
                invalid.report(
                    source.number(index),
                    f"id: {name!r}: its file was made from another request or picture; give another id, or delete it",
                )
    except OSError as error:
        raise OutputError(f"output-dir: {str(folder.path)!r} cannot be written: {error}") from error
    if invalid.count and not options.skip_invalid:
        raise RequestError(
            f"requests: {invalid.count} lines of {str(source.path)!r} are invalid; fix them ({folder.path / INVALID} "
            f"lists all), or pass --skip-invalid"
        )
    if not len(source):
        raise RequestError(f"requests: {str(source.path)!r} has no valid request; write one JSON object per line")
    wanted = (states == NEW) | ((states == FAILED) & options.retry_failed)
    num_failed = 0 if options.retry_failed else int((states == FAILED).sum())
    plan = Plan(np.flatnonzero(wanted), int((states == DONE).sum()), num_failed, invalid.count, setup)
    logger.info(
        "%s: %d to make, %d done, %d failed before, %d invalid; checked in %.1f s",
        source.path, len(plan.pending), plan.num_done, plan.num_failed, plan.num_invalid, time.monotonic() - began,
    )  # fmt: skip
    return plan


def _states(
    source: RequestsFile, folder: Path, config: Config, setup: str, *, verify: bool
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the state of each line of the file, one byte each."""
    states = np.full(len(source), NEW, np.uint8)
    others = np.zeros(len(source), np.bool_)
    for record in read_manifest(folder, brief=True):
        intact = record.status == "done" and _is_intact(folder, record, config, verify=verify)
        index = source.find(record.id)
        if index is None:
            alike = source.find_alike(record.id)  # some file systems give both one file
            if alike is not None and intact:
                states[alike] = CHANGED
            continue
        same = record.content == source.content(index)
        if intact:
            same = same and not _shows_another(source.line(index).request, record, config)
            states[index] = DONE if same else CHANGED
            others[index] = record.setup != setup
        else:
            states[index] = FAILED if same and record.status == "failed" else NEW
    if num_others := int((others & (states == DONE)).sum()):
        logger.warning("%d files were made with another model, weights, options or defaults; they stay", num_others)
    return states


def _is_intact(folder: Path, record: Record, config: Config, *, verify: bool) -> bool:
    assert record.file is not None, "`parse` requires it of done records"
    path = folder / record.file
    beside = sound_beside(path)
    if record.sound is not None:
        has_sound = _is_as_recorded(beside, record.sound, verify=verify)
    else:  # there is none, or an older version recorded none
        has_sound = config.model.traits.sound_rate is None or path.suffix != SUFFIX_OF["npy"] or beside.is_file()
    return has_sound and _is_as_recorded(path, record, verify=verify)


def _is_as_recorded(path: Path, recorded: Record | FileState, *, verify: bool) -> bool:
    found = stat_of(path)
    if found is None or found.size != recorded.size:
        return False
    return sha256_of(path) == recorded.sha256 if verify else found.mtime_ns == recorded.mtime_ns


def _shows_another(request: Request, record: Record, config: Config) -> bool:
    """Return whether a file has other pixels than the video was made from; without a changed one none is read."""
    files = {name: path for name, path in files_of(request).items() if name in record.pictures}
    now = {name: picture_of(path, record.pictures[name].sha256) for name, path in files.items()}
    if all(found in (None, record.pictures[name]) for name, found in now.items()):
        return False
    try:
        read = read_inputs(request, config).about
    except RequestError as error:
        logger.warning("request %s: its file stays: %s", record.id, error)
        return False
    return any(read[name].sha256 != record.pictures[name].sha256 for name in files)


def picture_of(path: Path, sha256: str) -> FileState | None:
    """Return the state of an image file with the digest of its pixels; None: it is not there."""
    found = stat_of(path)
    return None if found is None else FileState(found.size, found.mtime_ns, sha256)


class InvalidFile(InvalidLines):
    """Writes every invalid line to a file, which exists only if there is one."""

    def __init__(self, source: Path, path: Path) -> None:
        super().__init__(source)
        self._file = path
        self._sink: IO[str] | None = None

    def __enter__(self) -> InvalidFile:
        self._file.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink is not None:
            self._sink.close()
        self.log_rest()

    def report(self, number: int, fault: str) -> None:
        super().report(number, fault)
        if self._sink is None:
            self._sink = self._file.open("x")
        self._sink.write(json.dumps({"line": number, "error": fault}) + "\n")
