"""Finished latents of drivers that may come back, on the supervisor's disk."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

from disagg_ray.environment import cache_folder


class Keep:
    """Files by run id and request id: at most so many bytes, the oldest give way, and none older than `expire_s`."""

    def __init__(self, name: str, max_bytes: int, expire_s: float) -> None:
        self._folder = cache_folder() / "standing" / name
        self._max_bytes, self._expire_s = max_bytes, expire_s

    def file(self, run_id: str, request_id: str) -> Path:
        """Return where a request's latents are kept, having made room."""
        self._tidy()
        return self._folder / _digest(run_id) / f"{_digest(request_id)}.safetensors"

    def drop(self, run_id: str, request_id: str) -> None:
        """Remove a file, if there is one."""
        path = self._folder / _digest(run_id) / f"{_digest(request_id)}.safetensors"
        path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tidy(self) -> None:
        files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.glob("*/*"))
        excess = sum(size for _, size, _ in files) - self._max_bytes
        for changed, size, path in files:
            if excess > 0 or changed < time.time() - self._expire_s:
                path.unlink(missing_ok=True)
                excess -= size


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
