"""Where results go: checked before any work, written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np

from disagg_ray.errors import OutputError
from disagg_ray.request import Result
from disagg_ray.video import encode_png

SUFFIXES = {".mp4": "mp4", ".gif": "gif", ".npy": "npy", "": "png"}


def format_of(output: str | Path) -> str:
    """Return the format that a path's suffix asks for; no suffix is a folder of png files."""
    suffix = Path(str(output).rstrip("/")).suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(
            f"output: {str(output)!r} has the unknown suffix {suffix!r}; write .mp4, .gif, .npy, or none for png files"
        )
    return SUFFIXES[suffix]


def is_url(output: str | Path) -> bool:
    return "://" in str(output)


def check_output(output: str | Path, *, overwrite: bool, in_job: bool = False) -> None:
    """Check that a result can be written there, before any work.

    Raises:
        OutputError: exists without `overwrite`, cannot be written, or is relative inside a Ray job.
    """
    format_of(output)
    if is_url(output):
        _check_url(str(output), overwrite=overwrite)
        return
    path = Path(output).expanduser()
    if in_job and not path.is_absolute():
        raise OutputError(
            f"output: {str(output)!r} is relative, and a Ray job runs in a folder that Ray throws away; "
            f"write an absolute path or a URL such as s3://bucket/video.mp4"
        )
    if path.exists() and not overwrite:
        raise OutputError(f"output: {str(output)!r} exists; give --overwrite or another name")
    if path.exists() and path.is_dir() != (format_of(output) == "png"):
        raise OutputError(
            f"output: {str(output)!r} is {'a folder' if path.is_dir() else 'no folder'}; give another name"
        )
    if path.is_dir() and any(re.fullmatch(r"frame_\d+\.png", entry.name) is None for entry in path.iterdir()):
        raise OutputError(f"output: {str(output)!r} holds other files than frames; give the name of a new folder")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"output: {str(folder)!r} is not a folder that can be written")


def _check_url(url: str, *, overwrite: bool) -> None:
    if format_of(url) == "png":
        raise OutputError(f"output: {url!r} has no suffix; a folder of png files can only be written to a local path")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        exists = filesystem.exists(path)
    except (ImportError, OSError, ValueError) as error:
        raise OutputError(f"output: {url!r} cannot be reached: {error}") from error
    if exists and not overwrite:
        raise OutputError(f"output: {url!r} exists; give --overwrite or another name")


def save_result(result: Result, output: str | Path, *, overwrite: bool) -> Path | str:
    """Write a result to a path or fsspec URL; see `Result.save`."""
    wanted, made = format_of(output), result.request.format
    if wanted != made:
        raise OutputError(f"output: {str(output)!r} asks for {wanted}, but the request's format is {made}")
    check_output(output, overwrite=overwrite)
    try:
        if is_url(output):
            with fsspec.open(str(output), "wb") as sink:
                _write(result, sink)
            return str(output)
        path = Path(output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        if made == "png":
            _write_folder(result, path)
        else:
            with atomic_file(path) as sink:
                _write(result, sink)
        return path
    except OSError as error:
        raise OutputError(f"output: {str(output)!r} could not be written: {error}") from error


def _write(result: Result, sink) -> None:  # type: ignore[no-untyped-def]  # any binary file object
    if result.data is not None:
        sink.write(result.data)
    else:
        assert result.frames is not None
        np.save(sink, result.frames, allow_pickle=False)


def _write_folder(result: Result, path: Path) -> None:
    assert result.frames is not None
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for index, frame in enumerate(result.frames):
            (temporary / f"frame_{index:05d}.png").write_bytes(encode_png(frame))
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator:  # type: ignore[type-arg]  # yields a binary file object
    """Open a file that takes its name only once it is whole and on disk."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
