"""Standard output and error for the commands: always open, and never a reason to fail once the work is done."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
from typing import TYPE_CHECKING, TextIO

from disagg_ray.text import printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MAX_CHARS = 2_000
"""Longest message printed."""


class _Standard(io.FileIO):
    """A standard stream that drops what cannot be written, so that no work is lost."""

    failure: OSError | None = None
    """Why a write failed, unless the reader has gone, as after `| head`."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = error
            return memoryview(data).nbytes


def set_up() -> None:
    """Reopen descriptors that the shell has closed (a file opened later would get their numbers); wrap both streams."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            if null != descriptor:
                os.close(null)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(2, sys.stderr)


def _text(descriptor: int, before: TextIO | None) -> TextIO:
    raw = _Standard(descriptor, "wb", closefd=False)
    lines = descriptor == 2 or raw.isatty() or getattr(before, "write_through", False)
    encoding = before.encoding if before is not None else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


def flush() -> bool:
    """Flush standard output; report it and return False if that fails, as on a full disk."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failure = getattr(raw, "failure", None)
    if failure is not None:
        fail("failed", f"standard output cannot be written: {failure.strerror}")
    return failure is None


def fail(how: str, what: object) -> None:
    """Print why a command ends, in one line."""
    line = "; ".join(line.strip() for line in str(what).splitlines() if line.strip())
    print(f"disagg-ray: {how}: {printable(line, MAX_CHARS)}", file=sys.stderr)


def crash(error: Exception) -> None:
    """Print an unexpected error in one line that names the file with its traceback."""
    trace = "".join(traceback.format_exception(error))
    message = f"{type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(prefix="disagg_ray-error-", suffix=".txt", delete=False) as file:
            file.write(trace.encode(errors="backslashreplace"))
    except OSError:
        print(trace, file=sys.stderr)
        fail("failed", message)
    else:
        fail("failed", f"{message}; this is a bug in disagg_ray, please report it with {file.name}")
