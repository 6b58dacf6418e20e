"""The output folder of a batch: `ID.mp4` a request, and `manifest.jsonl`, one line a finished one.

One process at a time writes a folder. The lock is flock's, which the kernel lets go of with its holder, however that
ends; over NFS it holds between hosts where the mount supports locks (not with `nolock`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from disagg_ray.errors import OutputError
from disagg_ray.output import SUFFIXES, TEMPORARY
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import StageTiming

logger = logging.getLogger("disagg_ray")

MANIFEST = "manifest.jsonl"
INVALID = "invalid.jsonl"
"""The bad lines of the requests file, when there are any."""
WORK = ".work"
LATENTS = ".safetensors"
SUFFIX_OF = {format: suffix for suffix, format in SUFFIXES.items()}

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One line of the manifest: a finished request. Of several lines with one id the last one counts."""

    id: str
    status: str
    """done or failed."""
    content: str
    """Digest of what the request's line asked for."""
    setup: str
    """Digest of the model and the defaults it was made with."""
    finished: float
    """Seconds since the epoch."""
    file: str | None = None
    """Name in the folder."""
    size: int | None = None
    """Bytes; of a folder, of all its files."""
    sha256: str | None = None
    """Of the file; of a folder, of its files' names, sizes and bytes in order of their names."""
    mtime_ns: int | None = None
    """Of the file; of a folder, the latest one in it."""
    request: ResolvedRequest | None = None
    """None when it failed before it was resolved."""
    seconds: float | None = None
    """From admission to the last byte."""
    stages: tuple[StageTiming, ...] = ()
    """Where the time went, in the order of the graph."""
    error: str | None = None


class Folder:
    """An output folder that is this process's alone until it is closed.

    Raises:
        OutputError: it cannot be made or written, or another run has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        try:
            with ExitStack() as opened:
                path.mkdir(parents=True, exist_ok=True)
                opened.callback(os.close, _lock(path / ".lock"))
                self._folder = os.open(path, os.O_RDONLY)
                opened.callback(os.close, self._folder)
                self._manifest = os.open(path / MANIFEST, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                opened.callback(os.close, self._manifest)
                _clean(path)
                self._heal()
                (path / WORK).mkdir(exist_ok=True)
                self._opened = opened.pop_all()
        except OSError as error:
            raise OutputError(f"output-dir: {str(path)!r} cannot be written: {error}") from error

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next run have it."""
        if not any((self.path / WORK).glob("*")):
            shutil.rmtree(self.path / WORK, ignore_errors=True)
        self._opened.close()

    def video_of(self, name: str, format: str) -> Path:
        """Return where a request's video goes."""
        return self.path / f"{name}{SUFFIX_OF[format]}"

    def latents_of(self, name: str) -> Path:
        """Return where a request's latents stay until its video is written."""
        return self.path / WORK / f"{name}{LATENTS}"

    def check(self) -> None:
        """Check that the folder opened first is still there under its name.

        Raises:
            OSError: it is gone.
        """
        for path, descriptor in ((self.path, self._folder), (self.path / MANIFEST, self._manifest)):
            if not os.path.samestat(path.stat(), os.fstat(descriptor)):
                raise FileNotFoundError(f"{str(path)!r} was replaced")

    def append(self, record: Record) -> None:
        """Add a line, on disk before this returns, after the names of the files it speaks of.

        Raises:
            OSError: the disk is full or gone; the manifest is as it was.
        """
        line = json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n"
        with self._guard:
            os.fsync(self._folder)
            length = os.fstat(self._manifest).st_size
            try:
                if os.write(self._manifest, line) < len(line):
                    raise OSError("the disk is full")
                os.fsync(self._manifest)
            except OSError:
                os.ftruncate(self._manifest, length)
                raise

    def _heal(self) -> None:
        """Cut off a last line that a crash left half written."""
        with (self.path / MANIFEST).open("rb") as source:
            whole = length = os.fstat(source.fileno()).st_size
            while whole:
                start = max(0, whole - 2**16)
                source.seek(start)
                found = source.read(whole - start).rfind(b"\n")
                whole = start + found + 1
                if found >= 0:
                    break
        if whole < length:
            logger.warning("%s: its last line was half written and is cut off", self.path / MANIFEST)
            os.ftruncate(self._manifest, whole)


def read_manifest(folder: Path, *, brief: bool = False) -> Iterator[Record]:
    """Yield the records of a folder, oldest first; lines that are none are named in the log and left out.

    `brief` leaves `request` and `stages` out, in a third of the time.

    Raises:
        OutputError: there is no manifest that can be read.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as source:
            for number, line in enumerate(source, start=1):
                try:
                    yield _record(json.loads(line), brief=brief)
                except (ValueError, KeyError, TypeError, AttributeError):
                    logger.warning("%s:%d: not a record of a request; left out", path, number)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be read: {error}") from error


def _record(values: dict[str, Any], *, brief: bool) -> Record:
    if not isinstance(values["id"], str) or (values["status"] == "done" and not isinstance(values["file"], str)):
        raise TypeError("not what this program wrote")
    if brief:
        return _fill(Record, values | {"request": None, "stages": ()})
    request = values.get("request")
    stages = tuple(_fill(StageTiming, stage) for stage in values.get("stages", ()))
    return _fill(Record, values | {"request": request and _fill(ResolvedRequest, request), "stages": stages})


def _fill(cls: type[T], values: dict[str, Any]) -> T:
    """Build a dataclass of what another version wrote: unknown fields are left out, missing ones are None."""
    return cls(**{name: values.get(name, default) for name, default in DEFAULTS[cls].items()})


DEFAULTS: dict[type, dict[str, Any]] = {
    cls: {f.name: None if f.default is MISSING else f.default for f in fields(cls)}
    for cls in (Record, StageTiming, ResolvedRequest)
}


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise OutputError(
            f"output-dir: {str(path.parent)!r} is being written by {holder}; wait for it, or give another folder"
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _clean(path: Path) -> None:
    """Remove what a killed run was just writing."""
    for half in (*path.glob(f"{TEMPORARY}*"), *(path / WORK).glob(f"{TEMPORARY}*")):
        if half.is_dir():
            shutil.rmtree(half)
        else:
            half.unlink()


@dataclass(frozen=True)
class Stat:
    """What tells that a file is still the one that was written."""

    size: int
    mtime_ns: int


def stat_of(path: Path) -> Stat | None:
    """Return a video's size and time of change, or None where there is none."""
    try:
        own = path.stat()
        if not path.is_dir():
            return Stat(own.st_size, own.st_mtime_ns)
        inside = [file.stat() for file in path.iterdir()]
    except OSError:
        return None
    return Stat(sum(s.st_size for s in inside), max(s.st_mtime_ns for s in (own, *inside)))


def sha256_of(path: Path) -> str:
    """Return the digest of a file, or of a folder's files."""
    if not path.is_dir():
        with path.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        digest.update(f"{file.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()
