"""The output folder of a batch: one `ID.mp4` per request, and `manifest.jsonl`, one line per finished request.

One process at a time writes a folder, by an flock, which the kernel releases however its holder ends. Over NFS it
holds between hosts if the mount supports locks (not with `nolock`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from disagg_ray.batch.lines import InvalidLines, read_lines
from disagg_ray.batch.records import MAX_LINE_BYTES, FileState, Record, parse
from disagg_ray.errors import OutputError
from disagg_ray.media.locks import locked
from disagg_ray.media.output import open_own
from disagg_ray.media.places import SUFFIX_OF, TEMPORARY
from disagg_ray.media.sound import wav_beside
from disagg_ray.result import Result, rescued

logger = logging.getLogger("disagg_ray")

MANIFEST = "manifest.jsonl"
INVALID = "invalid.jsonl"
"""The invalid lines of the requests file, if any."""
WORK = ".work"

TORN = "manifest.torn"
"""Half-written lines that crashes left."""


class Folder:
    """An output folder, locked until it is closed.

    Raises:
        OutputError: it cannot be made or written, or another run holds its lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._is_kept = False
        try:
            with ExitStack() as opened:
                path.mkdir(parents=True, exist_ok=True)
                opened.enter_context(locked(path / ".lock"))
                self._folder = os.open(path, os.O_RDONLY)
                opened.callback(os.close, self._folder)
                self._manifest = open_own(path / MANIFEST, os.O_RDWR | os.O_CREAT | os.O_APPEND)
                opened.callback(os.close, self._manifest)
                (path / WORK).mkdir(exist_ok=True)
                if (path / WORK).is_symlink():
                    raise OSError(f"{WORK} is a symbolic link; remove it")
                _clean(path)
                self._heal()
                self._opened = opened.pop_all()
        except BlockingIOError as error:
            raise OutputError(
                f"output-dir: {str(path)!r} is being written by {error.strerror}; wait for it, or give another folder"
            ) from error
        except OSError as error:
            raise OutputError(f"output-dir: {str(path)!r} cannot be written: {error}") from error

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock, and remove `.work` if it is empty; after `keep_open` do nothing."""
        if self._is_kept:
            return
        if not any((self.path / WORK).glob("*")):
            shutil.rmtree(self.path / WORK, ignore_errors=True)
        self._opened.close()

    def keep_open(self) -> None:
        """Keep the lock until this process ends: one of its threads may still write here."""
        self._is_kept = True

    def video_of(self, name: str, format: str) -> Path:
        """Return the path of a request's video."""
        return self.path / f"{name}{SUFFIX_OF[format]}"

    def latents_of(self, name: str) -> Path:
        """Return the file that keeps a request's latents until its video is written."""
        return self.path / WORK / f"{name}.safetensors"

    def check(self) -> None:
        """Check that folder and manifest are the ones that were opened.

        Raises:
            OSError: one of them was moved or replaced.
        """
        for path, descriptor in ((self.path, self._folder), (self.path / MANIFEST, self._manifest)):
            if not os.path.samestat(path.stat(), os.fstat(descriptor)):
                raise FileNotFoundError(f"{str(path)!r} was replaced")

    def append(self, record: Record) -> None:
        """Append a line and sync it to disk, after the folder's file names.

        Raises:
            OSError: the disk is full or gone; the manifest is unchanged.
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
        """Move a last line that a crash left half written to `manifest.torn`."""
        length = os.fstat(self._manifest).st_size
        whole = 0
        if length:
            with mmap.mmap(self._manifest, 0, access=mmap.ACCESS_READ) as content:
                whole = content.rfind(b"\n") + 1
        if whole == length:
            return
        logger.warning("%s: the last line is half written; moving it to %s", self.path / MANIFEST, TORN)
        torn = os.fdopen(open_own(self.path / TORN, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "wb")
        with torn, os.fdopen(os.dup(self._manifest), "rb") as source:
            source.seek(whole)
            shutil.copyfileobj(source, torn)
            torn.write(b"\n")
            torn.flush()
            os.fsync(torn.fileno())
        os.ftruncate(self._manifest, whole)


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


def read_manifest(folder: Path, *, brief: bool = False) -> Iterator[Record]:
    """Yield the records of a folder, oldest first; log invalid lines and skip them.

    `brief` leaves `request` and `stages` out, which is three times as fast.

    Raises:
        OutputError: the manifest cannot be read.
    """
    path = folder / MANIFEST
    invalid = InvalidLines(path)
    try:
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as source:
            for _, number, line in read_lines(source, MAX_LINE_BYTES):
                try:
                    record = parse(line, brief=brief)
                except ValueError as error:
                    invalid.report(number, f"not a record of a request; left out: {error}")
                else:
                    yield record
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be read: {error}") from error
    invalid.log_rest()


def _clean(path: Path) -> None:
    """Remove the temporary files of a killed run."""
    for half in (*path.glob(f"{TEMPORARY}*"), *(path / WORK).glob(f"{TEMPORARY}*")):
        if half.is_dir() and not half.is_symlink():
            shutil.rmtree(half)
        else:
            half.unlink()


@dataclass(frozen=True)
class Stat:
    """Size and modification time of a video, by which it is recognised."""

    size: int
    mtime_ns: int


def stat_of(path: Path) -> Stat | None:
    """Return size and modification time of a file, or of a folder with its files; None: not there, or neither."""
    try:
        own = path.stat()
        if stat.S_ISREG(own.st_mode):
            return Stat(own.st_size, own.st_mtime_ns)
        inside = [file.stat() for file in path.iterdir()]
    except OSError:
        return None
    return Stat(sum(s.st_size for s in inside), max(s.st_mtime_ns for s in (own, *inside)))


def sound_beside(path: Path) -> Path:
    """Return the file of the sound of raw frames."""
    return Path(wav_beside(str(path)))


def state_of(path: Path) -> FileState:
    """Return the state of a file or folder that was just written.

    Raises:
        OSError: it is gone.
    """
    if (found := stat_of(path)) is None:
        raise FileNotFoundError(f"No such file: {str(path)!r} is gone")
    return FileState(found.size, found.mtime_ns, sha256_of(path))


def sha256_of(path: Path) -> str:
    """Return the digest of a file, or of a folder's files with their names and sizes."""
    if not path.is_dir():
        with path.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        with file.open("rb") as source:
            digest.update(f"{file.name}\0{os.fstat(source.fileno()).st_size}\0".encode(errors="surrogateescape"))
            while piece := source.read(2**20):
                digest.update(piece)
    return digest.hexdigest()
