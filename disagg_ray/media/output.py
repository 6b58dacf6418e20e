"""Writes results, and leaves no partial file."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from disagg_ray.environment import expand_home
from disagg_ray.errors import OutputError
from disagg_ray.media import storage
from disagg_ray.media.places import SUFFIX_OF, TEMPORARY, check_place, format_of, is_url, local_path
from disagg_ray.media.video import Frames, encode_png

RESCUE_PLACES = (None, "~", ".", "/dev/shm")
"""None: the temporary folder."""


def write(content: bytes | Frames, made: str, output: str | Path, *, overwrite: bool) -> Path | str:
    """Write an encoded file, or frames as a folder or npy, to a path or fsspec URL; `made` is its format.

    Raises:
        OutputError: the suffix is not the format's, or the place cannot be written.
    """
    if (wanted := format_of(output)) != made:
        raise OutputError(f"output: {str(output)!r} asks for {wanted}, but the request's format is {made}")
    check_place(output, overwrite=overwrite)
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


def rescue(contents: Mapping[str, bytes | Frames]) -> Path:
    """Write files, by format, that could not be written to their place into a new private folder; return the first.

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
            paths = [
                Path(write(content, made, folder / f"video{SUFFIX_OF[made]}", overwrite=False))
                for made, content in contents.items()
            ]
            return paths[0]
        except OutputError as error:
            failures.append(str(error))
            shutil.rmtree(folder, ignore_errors=True)
    raise OutputError(f"output: no other place took it either: {'; '.join(failures)}")


def _write_file(content: bytes | Frames, sink: IO[bytes]) -> None:
    if isinstance(content, bytes):
        sink.write(content)
    else:
        content = np.ascontiguousarray(content)  # written as bytes: of a full disk numpy says only how much it took
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
