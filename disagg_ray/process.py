"""What is done to a whole process because a library leaves no other way; each says why, and when it can go."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


def trim() -> None:
    """Return free heap memory to the system; does nothing where the C library is not glibc.

    Each thread has its own arena, which otherwise only grows: with the forty threads of Ray, ZeroMQ and Mooncake, by
    0.1 MB with each request.
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discard what is written to the process's stderr inside.

    Mooncake writes an error line that means nothing whenever it starts, whatever its log level; needless once it does
    not.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def imports_kept() -> Iterator[None]:
    """Exempt what is imported inside from garbage collection: Python looks through it again and again, in vain.

    With torch, diffusers and transformers that takes a tenth of a replica's start, and a quarter of a second at each
    full collection afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
