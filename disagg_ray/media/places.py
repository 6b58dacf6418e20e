"""Where results may be written: the format that a name asks for, and the checks before any work."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from disagg_ray.environment import expand_home
from disagg_ray.errors import OutputError
from disagg_ray.media import storage

FORMATS = ("mp4", "gif", "npy", "png", "webp", "jpg", "wav")
SUFFIXES = {"": "frames", ".jpeg": "jpg"} | {f".{name}": name for name in FORMATS}
SUFFIX_OF = {format: suffix for suffix, format in SUFFIXES.items()}
TRY_BYTES = 4096
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
    check_place(output, overwrite=overwrite, in_job=in_job)
    if is_url(output):
        storage.attempt(str(output), TEMPORARY)
    else:
        try_folder(local_path(output).parent, f"output: {str(output)!r}")


def check_place(output: str | Path, *, overwrite: bool, in_job: bool = False) -> None:
    """Check what `check_output` does, but write nothing."""
    _check_name(output, "output")
    format_of(output)
    try:
        if is_url(output):
            _check_url(str(output), overwrite=overwrite)
        else:
            _check_kept(output, "output", in_job=in_job, more=" or a URL such as s3://bucket/video.mp4")
            _check_path(local_path(output), repr(str(output)), overwrite=overwrite)
    except OSError as error:
        raise OutputError(f"output: {str(output)!r} cannot be reached: {error}") from error


def _check_name(path: str | Path, field: str) -> None:
    if str(path) == "-":
        raise OutputError(f"{field}: '-' would be standard output, where messages go; write a name")
    if "\0" in str(path):
        raise OutputError(f"{field}: {str(path)!r} holds a NUL, which no name can; leave it out")


def _check_kept(path: str | Path, field: str, *, in_job: bool, more: str = "") -> None:
    if in_job and not local_path(path).is_absolute():
        raise OutputError(
            f"{field}: {str(path)!r} is relative, and a Ray job runs in a folder that Ray throws away; "
            f"write an absolute path{more}"
        )


def check_folder(folder: str | Path, field: str = "output-dir", *, in_job: bool = False) -> None:
    """Check that a batch or a report can make its folder there.

    Raises:
        OutputError: it is a URL, a file, standard output, or relative inside a Ray job.
    """
    _check_name(folder, field)
    if is_url(folder):
        raise OutputError(f"{field}: {str(folder)!r} is a URL; write the path of a folder that the driver sees")
    _check_kept(folder, field, in_job=in_job)
    if (path := local_path(folder)).exists() and not path.is_dir():
        raise OutputError(f"{field}: {str(folder)!r} is no folder; give the name of one, or of a new one")


def check_trace(path: str | Path, *, in_job: bool = False) -> None:
    """Check that a trace can be written there, before any work; an older one is replaced.

    Raises:
        OutputError: is no .json file on this machine, is relative inside a Ray job, or cannot be written.
    """
    if is_url(path) or local_path(path).suffix.lower() != ".json" or local_path(path).is_dir():
        raise OutputError(f"trace: {str(path)!r} is no name of a JSON file on this machine; write one like trace.json")
    _check_kept(path, "trace", in_job=in_job)
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


def _check_path(path: Path, shown: str, *, overwrite: bool) -> None:
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
