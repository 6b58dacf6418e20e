"""Writes results: checks the place before any work, and leaves no partial file."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from disagg_ray.environment import expand_home
from disagg_ray.errors import OutputError
from disagg_ray.media import storage
from disagg_ray.media.video import Frames, encode_png

FORMATS = ("mp4", "gif", "npy", "png", "webp", "jpg", "wav")
SUFFIXES = {"": "frames", ".jpeg": "jpg"} | {f".{name}": name for name in FORMATS}
SUFFIX_OF = {format: suffix for suffix, format in SUFFIXES.items()}
TRY_BYTES = 4096
RESCUE_PLACES = (None, "~", ".", "/dev/shm")
"""None: the temporary folder."""
TEMPORARY = ".disagg_ray-"
"""Prefix of the names of files and folders that are being written."""


def format_of(output: str | Path) -> str:
    """Return the format that a path's suffix asks for; no suffix is a folder of png files."""
    suffix = Path(str(output).rstrip("/")).suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(
            f"output: {str(output)!r} has the unknown suffix {suffix!r}; write .mp4, .gif, .npy, or none for "
            f"png files; for an image .png, .webp or .jpg"
        )
    return SUFFIXES[suffix]


def is_url(output: str | Path) -> bool:
    """Return whether fsspec writes it; `file://` is a local path."""
    return "://" in str(output) and not str(output).startswith("file://")


def local_path(output: str | Path) -> Path:
    return expand_home(str(output).removeprefix("file://"))


def check_output(output: str | Path, *, overwrite: bool, in_job: bool = False) -> None:
    """Check that a result can be written there, before any work: a small file is written there and removed.

    Raises:
        OutputError: exists without `overwrite`, cannot be written, or is relative inside a Ray job.
    """
    _check(output, overwrite=overwrite, in_job=in_job)
    if is_url(output):
        storage.attempt(str(output), TEMPORARY)
    else:
        try_folder(local_path(output).parent, f"output: {str(output)!r}")


def _check(output: str | Path, *, overwrite: bool, in_job: bool = False) -> None:
    _check_name(output, "output")
    format_of(output)
    try:
        if is_url(output):
            _check_url(str(output), overwrite=overwrite)
        else:
            _check_path(local_path(output), repr(str(output)), overwrite=overwrite, in_job=in_job)
    except OSError as error:
        raise OutputError(f"output: {str(output)!r} cannot be reached: {error}") from error


def _check_name(path: str | Path, field: str) -> None:
    if str(path) == "-":
        raise OutputError(f"{field}: '-' would be standard output, where messages go; write a name")
    if "\0" in str(path):
        raise OutputError(f"{field}: {str(path)!r} holds a NUL, which no name can; leave it out")


def check_folder(folder: str | Path, *, in_job: bool = False) -> None:
    """Check that a batch can make its folder there.

    Raises:
        OutputError: it is a URL, standard output, or relative inside a Ray job.
    """
    _check_name(folder, "output-dir")
    if is_url(folder):
        raise OutputError(f"output-dir: {str(folder)!r} is a URL; write the path of a folder that the driver sees")
    if in_job and not local_path(folder).is_absolute():
        raise OutputError(
            f"output-dir: {str(folder)!r} is relative, and a Ray job runs in a folder that Ray throws away; "
            f"write an absolute path"
        )


def check_trace(path: str | Path, *, in_job: bool = False) -> None:
    """Check that a trace can be written there, before any work; an older one is replaced.

    Raises:
        OutputError: is no .json file on this machine, is relative inside a Ray job, or cannot be written.
    """
    if is_url(path) or local_path(path).suffix.lower() != ".json" or local_path(path).is_dir():
        raise OutputError(f"trace: {str(path)!r} is no name of a JSON file on this machine; write one like trace.json")
    if in_job and not local_path(path).is_absolute():
        raise OutputError(
            f"trace: {str(path)!r} is relative, and a Ray job runs in a folder that Ray throws away; "
            f"write an absolute path"
        )
    try_folder(local_path(path).parent, f"trace: {str(path)!r}")


def check_file(path: Path, field: str) -> None:
    """Check that a file can be written there, before any work; an older one is replaced.

    Raises:
        OutputError: it is a folder or standard output, or cannot be written.
    """
    _check_name(path, field)
    if path.is_dir():
        raise OutputError(f"{field}: {str(path)!r} is a folder; give the name of a file")
    try_folder(path.parent, f"{field}: {str(path)!r}")


def try_folder(folder: Path, shown: str) -> None:
    """Write a small file into a folder, or where it will be made, and remove it.

    Raises:
        OutputError: begins with `shown`.
    """
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{shown} cannot be written: {str(folder)!r} is not a folder that can be written")
    try:
        with tempfile.NamedTemporaryFile(buffering=0, prefix=TEMPORARY, dir=folder) as file:
            file.write(bytes(TRY_BYTES))
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{shown} cannot be written: {str(folder)!r} takes no file: {error.strerror}") from error


def _check_path(path: Path, shown: str, *, overwrite: bool, in_job: bool) -> None:
    if in_job and not path.is_absolute():
        raise OutputError(
            f"output: {shown} is relative, and a Ray job runs in a folder that Ray throws away; "
            f"write an absolute path or a URL such as s3://bucket/video.mp4"
        )
    if not path.name:
        raise OutputError(f"output: {shown} names no file; write one such as video.mp4")
    if path.is_symlink():
        raise OutputError(
            f"output: {shown} is a link to {str(path.readlink())!r}; give the name of what is to be written"
        )
    if path.exists() and not overwrite:
        raise OutputError(f"output: {shown} exists; give --overwrite or another name")
    if path.exists() and path.is_dir() != (format_of(path) == "frames"):
        raise OutputError(f"output: {shown} is {'a folder' if path.is_dir() else 'no folder'}; give another name")
    if path.exists() and not path.is_dir() and not path.is_file():
        raise OutputError(f"output: {shown} is no regular file; give another name")
    if path.is_dir() and any(re.fullmatch(r"frame_\d+\.png", entry.name) is None for entry in path.iterdir()):
        raise OutputError(f"output: {shown} holds other files than frames; give the name of a new folder")


def _check_url(url: str, *, overwrite: bool) -> None:
    if format_of(url) == "frames":
        raise OutputError(f"output: {url!r} has no suffix; a folder of png files can only be written to a local path")
    if url.startswith(("http://", "https://")):
        raise OutputError(f"output: {url!r} cannot be written; give a path or a URL such as s3://bucket/video.mp4")
    if storage.exists(url) and not overwrite:
        raise OutputError(f"output: {url!r} exists; give --overwrite or another name")


def write(content: bytes | Frames, made: str, output: str | Path, *, overwrite: bool) -> Path | str:
    """Write an encoded file, or frames as a folder or npy, to a path or fsspec URL; `made` is its format.

    Raises:
        OutputError: the suffix is not the format's, or the place cannot be written.
    """
    if (wanted := format_of(output)) != made:
        raise OutputError(f"output: {str(output)!r} asks for {wanted}, but the request's format is {made}")
    _check(output, overwrite=overwrite)
    if is_url(output):
        storage.write(str(output), partial(_write_file, content))
        return str(output)
    path = local_path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if made == "frames":
            assert isinstance(content, np.ndarray)
            _write_folder(content, path)
        else:
            with atomic_file(path) as sink:
                _write_file(content, sink)
    except OSError as error:
        raise OutputError(f"output: {str(output)!r} could not be written: {error}") from error
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        OutputError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as sink:
            sink.write(text.encode())
    except OSError as error:
        raise OutputError(f"output: {str(path)!r} could not be written: {error.strerror}") from error


def rescue(content: bytes | Frames, made: str) -> Path:
    """Write a result that could not be written to its place into a new private folder; return its path.

    Raises:
        OutputError: no place took it.
    """
    failures = []
    for place in RESCUE_PLACES:
        try:
            folder = Path(tempfile.mkdtemp(prefix="disagg_ray-rescued-", dir=place and expand_home(place)))
        except OSError as error:
            failures.append(str(error))
            continue
        try:
            return Path(write(content, made, folder / f"video{SUFFIX_OF[made]}", overwrite=False))
        except OutputError as error:
            failures.append(str(error))
            shutil.rmtree(folder, ignore_errors=True)
    raise OutputError(f"output: no other place took it either: {'; '.join(failures)}")


def _write_file(content: bytes | Frames, sink: IO[bytes]) -> None:
    if isinstance(content, bytes):
        sink.write(content)
    else:
        content = np.ascontiguousarray(
            content
        )  # and written as any bytes: numpy says of a full disk only how much it took
        np.lib.format.write_array_header_1_0(sink, np.lib.format.header_data_from_array_1_0(content))
        sink.write(content.data)


def _write_folder(frames: Frames, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        for index, frame in enumerate(frames):
            with atomic_file(new / f"frame_{index:05d}.png") as sink:
                sink.write(encode_png(frame))
        old = Path(temporary) / "old"
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise


def open_own(path: Path, flags: int) -> int:
    """Open a regular file of ours, with one name; a link in its place is refused.

    Raises:
        OSError: it is a link, has a second name, or is no regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path.name} is a symbolic link; remove it") from error
        raise
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
        os.close(descriptor)
        raise OSError(f"{path.name} is no regular file of its own; remove it")
    return descriptor


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name once it is complete and on disk."""
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
