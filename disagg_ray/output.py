"""Where results go: checked before any work, written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import fsspec
import numpy as np

from disagg_ray.environment import expand_home
from disagg_ray.errors import OutputError
from disagg_ray.video import Frames, encode_png

SUFFIXES = {".mp4": "mp4", ".gif": "gif", ".npy": "npy", "": "png"}
TEMPORARY = ".disagg_ray-"
"""How the names of files and folders begin that are being written."""


def format_of(output: str | Path) -> str:
    """Return the format that a path's suffix asks for; no suffix is a folder of png files."""
    suffix = Path(str(output).rstrip("/")).suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(
            f"output: {str(output)!r} has the unknown suffix {suffix!r}; write .mp4, .gif, .npy, or none for png files"
        )
    return SUFFIXES[suffix]


def is_url(output: str | Path) -> bool:
    """Return whether fsspec writes it; `file://` is a local path, written as whole as any."""
    return "://" in str(output) and not str(output).startswith("file://")


def local_path(output: str | Path) -> Path:
    return expand_home(str(output).removeprefix("file://"))


def check_output(output: str | Path, *, overwrite: bool, in_job: bool = False) -> None:
    """Check that a result can be written there, before any work.

    Raises:
        OutputError: exists without `overwrite`, cannot be written, or is relative inside a Ray job.
    """
    format_of(output)
    try:
        if is_url(output):
            _check_url(str(output), overwrite=overwrite)
        else:
            _check_path(local_path(output), repr(str(output)), overwrite=overwrite, in_job=in_job)
    except OSError as error:
        raise OutputError(f"output: {str(output)!r} cannot be reached: {error}") from error


def check_folder(folder: str | Path, *, in_job: bool = False) -> None:
    """Check that a batch can have its folder there; making it shows the rest.

    Raises:
        OutputError: it is a URL, or relative inside a Ray job.
    """
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
    _check_parent(local_path(path), f"trace: {str(path)!r}")


def _check_parent(path: Path, shown: str) -> None:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{shown} cannot be written: {str(folder)!r} is not a folder that can be written")


def _check_path(path: Path, shown: str, *, overwrite: bool, in_job: bool) -> None:
    if in_job and not path.is_absolute():
        raise OutputError(
            f"output: {shown} is relative, and a Ray job runs in a folder that Ray throws away; "
            f"write an absolute path or a URL such as s3://bucket/video.mp4"
        )
    if not path.name:
        raise OutputError(f"output: {shown} names no file; write one such as video.mp4")
    if path.exists() and not overwrite:
        raise OutputError(f"output: {shown} exists; give --overwrite or another name")
    if path.exists() and path.is_dir() != (format_of(path) == "png"):
        raise OutputError(f"output: {shown} is {'a folder' if path.is_dir() else 'no folder'}; give another name")
    if path.is_dir() and any(re.fullmatch(r"frame_\d+\.png", entry.name) is None for entry in path.iterdir()):
        raise OutputError(f"output: {shown} holds other files than frames; give the name of a new folder")
    _check_parent(path, f"output: {shown}")


def _check_url(url: str, *, overwrite: bool) -> None:
    if format_of(url) == "png":
        raise OutputError(f"output: {url!r} has no suffix; a folder of png files can only be written to a local path")
    if url.startswith(("http://", "https://")):
        raise OutputError(f"output: {url!r} cannot be written; give a path or a URL such as s3://bucket/video.mp4")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise OutputError(f"output: {url!r} cannot be reached: {error}") from error
    if filesystem.exists(path) and not overwrite:
        raise OutputError(f"output: {url!r} exists; give --overwrite or another name")


def write(content: bytes | Frames, made: str, output: str | Path, *, overwrite: bool) -> Path | str:
    """Write an encoded file, or frames as png or npy, to a path or fsspec URL; `made` is its format.

    Raises:
        OutputError: the suffix is not the format's, or the place cannot be written.
    """
    if (wanted := format_of(output)) != made:
        raise OutputError(f"output: {str(output)!r} asks for {wanted}, but the request's format is {made}")
    check_output(output, overwrite=overwrite)
    try:
        if is_url(output):
            with fsspec.open(str(output), "wb") as sink:
                _write_file(content, sink)
            return str(output)
        path = local_path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        if made == "png":
            assert isinstance(content, np.ndarray)
            _write_folder(content, path)
        else:
            with atomic_file(path) as sink:
                _write_file(content, sink)
        return path
    except OSError as error:
        raise OutputError(f"output: {str(output)!r} could not be written: {error}") from error


def _write_file(content: bytes | Frames, sink: IO[bytes]) -> None:
    if isinstance(content, bytes):
        sink.write(content)
    else:
        np.save(sink, content, allow_pickle=False)


def _write_folder(frames: Frames, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        for index, frame in enumerate(frames):
            (new / f"frame_{index:05d}.png").write_bytes(encode_png(frame))
        if path.exists():
            path.rename(Path(temporary) / "old")
        new.rename(path)


def open_own(path: Path, flags: int) -> int:
    """Open a file that we write or wrote, and none that another name leads to: a link in its place is not followed.

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
    """Open a file that takes its name only once it is whole and on disk."""
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
