"""Results that go to a URL, and folders of either kind read back: the only place that imports fsspec.

Each kind of storage has errors of its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

import fsspec
from fsspec.registry import known_implementations

from disagg_ray.errors import OutputError
from disagg_ray.text import printable

PIECE_BYTES = 256 * 1024
"""Of what is read at once."""
BLOCK_BYTES = 4 * 1024 * 1024
"""Of what is fetched at once from storage that is far away."""


def missing_package(url: str) -> str:
    """Return how to install what reaches a URL, as `pip install s3fs`; empty: it is installed, or nothing is known."""
    protocol = fsspec.core.split_protocol(url)[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = known_implementations[protocol]["class"].partition(".")[0]
        return printable(str(error)) if package == "fsspec" else f"pip install {package}"
    except ValueError:
        return ""
    return ""


def exists(url: str) -> bool:
    """Raises OutputError: the storage cannot be reached."""
    with _mapped(url, "reached"):
        filesystem, path = fsspec.core.url_to_fs(url)
        return bool(filesystem.exists(path))


def attempt(url: str, prefix: str) -> None:
    """Write a small object beside what a URL names, and remove it.

    Raises:
        OutputError: access is refused, or the storage does not support it.
    """
    with _mapped(url, "written, as a small object beside it shows"):
        filesystem, path = fsspec.core.url_to_fs(f"{url.rpartition('/')[0]}/{prefix}{uuid.uuid4().hex}")
        filesystem.pipe_file(path, b"a test")
        filesystem.rm_file(path)


def write(url: str, fill: Callable[[IO[bytes]], None]) -> None:
    """Write an object; storage that knows no other names shows it once it is whole.

    Raises:
        OutputError: it could not be.
    """
    with _mapped(url, "written"), fsspec.open(url, "wb") as sink:
        fill(sink)


def size(place: str) -> int:
    """Return the bytes of a file at a path or URL.

    Raises:
        OutputError: it is not there, or cannot be reached.
    """
    with _mapped(place, "read"):
        filesystem, path = fsspec.core.url_to_fs(place)
        return int(filesystem.size(path))


def read(place: str, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes of a file at a path or URL from `start` up to `stop`, in pieces.

    Raises:
        OutputError: it is not there, or cannot be reached.
    """
    with _mapped(place, "read"):
        filesystem, path = fsspec.core.url_to_fs(place)
        with filesystem.open(path, "rb", block_size=BLOCK_BYTES) as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE_BYTES, stop - start))):
                start += len(piece)
                yield piece


def remove(place: str) -> None:
    """Remove a file at a path or URL, if it is there.

    Raises:
        OutputError: it cannot be.
    """
    with _mapped(place, "removed"):
        filesystem, path = fsspec.core.url_to_fs(place)
        with suppress(FileNotFoundError):  # another process removes it too
            if filesystem.exists(path):
                filesystem.rm_file(path)


@contextmanager
def _mapped(url: str, done: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise OutputError(f"output: {url!r} needs a package that is not installed: {missing_package(url)}") from error
    except Exception as error:
        said = printable(f"{type(error).__name__}: {error}")
        raise OutputError(f"output: {url!r} cannot be {done}: {said}") from error
