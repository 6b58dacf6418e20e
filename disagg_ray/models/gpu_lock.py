"""Processes that share a GPU compute by turns.

Left to the driver's time slices, a denoise and a decode on one GPU take longer than one after the other
(docs/performance.md). A turn is a model's whole call: one forward of a transformer, one decode of a VAE. What a
process does beside its models, as bringing frames to the host, needs no turn, and so runs beside the other's turn.
Who has another temporary folder, as in another container, takes no part.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from disagg_ray.errors import ConfigError

CALLS = ("encode", "decode")
"""What is called of a VAE; of any other model, `forward`."""


class GpuLock:
    """A GPU's turns, as one process takes them.

    Two file locks make them fair: the process that waits for the turn holds the second one, so a process that has just
    had its turn queues behind it. The kernel releases a dead process's locks; a process that hangs in its turn is
    killed by its driver after `failures.stall_s`, and processes that wait do not count as hanging.
    """

    def __init__(self, gpu: str) -> None:
        """Take part in the turns of the GPU with this name, which no other GPU of the machine has.

        Raises:
            ConfigError: somebody else could write where the locks are.
        """
        folder = _private_folder()
        self._next, self._turn = (_open(folder / f"{gpu}.{name}") for name in ("next", "turn"))
        self.waiting = False
        """Whether this process waits for its turn."""
        self.began = 0.0
        """When its last turn began, by the monotonic clock."""
        self.held_s = 0.0
        """Seconds of all turns it had."""

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn, and hold it."""
        self.waiting = True
        fcntl.flock(self._next, fcntl.LOCK_EX)
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        fcntl.flock(self._next, fcntl.LOCK_UN)
        self.waiting, self.began = False, time.monotonic()
        try:
            yield
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
            self.held_s += time.monotonic() - self.began

    def apply(self, model: Any, finish: Callable[[], None]) -> None:
        """Have every call of a model take a turn, which ends when `finish` has waited for the device to be done."""
        names = [name for name in CALLS if hasattr(model, name)] or ["forward"]
        for name in names:
            setattr(model, name, self._by_turns(getattr(model, name), finish))

    def _by_turns(self, method: Callable[..., Any], finish: Callable[[], None]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.take():
                made = method(*args, **kwargs)
                finish()
                return made

        return call


def _private_folder() -> Path:
    """Return this user's folder for locks, which no other user can write, and so block the GPUs."""
    folder = Path(tempfile.gettempdir()) / f"disagg_ray_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if about.st_uid != os.getuid() or folder.is_symlink() or about.st_mode & 0o022:
        raise ConfigError(f"gpu_turns: its locks' folder {folder} is not this user's alone; remove it, or write false")
    return folder


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
