"""Locks on files: the kernel releases one however its holder ends, so the file that is left behind locks nothing."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disagg_ray.media.output import open_own
from disagg_ray.text import printable

RETRY_S = 0.05


@contextmanager
def locked(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is not there, and names its holder.

    Raises:
        BlockingIOError: another process held it for `wait_s`; its `strerror` says which.
        OSError: the file cannot be written, or its file system has no locks.
    """
    descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        _lock(descriptor, time.monotonic() + wait_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                holder = printable(os.pread(descriptor, 200, 0).decode(errors="replace").strip())
                raise BlockingIOError(error.errno, holder or "another process") from error
            time.sleep(RETRY_S)
        else:
            return
