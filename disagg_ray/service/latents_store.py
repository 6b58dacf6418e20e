"""Finished latents of clients that may come back, on the supervisor's disk."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from disagg_ray.environment import cache_folder
from disagg_ray.media.places import TEMPORARY

logger = logging.getLogger("disagg_ray")


class LatentsStore:
    """Files by run id and request id: at most `max_bytes`, the oldest evicted first, and none older than `expire_s`."""

    def __init__(self, name: str, max_bytes: int, expire_s: float) -> None:
        self._folder = cache_folder() / "service" / name
        self._max_bytes, self._expire_s = max_bytes, expire_s

    def file(self, run_id: str, request_id: str) -> Path:
        """Return where a request's latents are kept."""
        return self._folder / _digest(run_id) / f"{_digest(request_id)}.safetensors"

    def drop(self, run_id: str, request_ids: Iterable[str]) -> None:
        """Remove files, if they exist."""
        for request_id in request_ids:
            self.file(run_id, request_id).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def evict(self) -> None:
        """Remove files that are too old or too many; other threads may write, drop and evict files meanwhile."""
        try:
            files = sorted(self._files())
            excess = sum(size for _, size, path in files if _is_whole(path)) - self._max_bytes
            for changed, size, path in files:
                if (_is_whole(path) and excess > 0) or changed < time.time() - self._expire_s:
                    path.unlink(missing_ok=True)
                    excess -= size if _is_whole(path) else 0
            for run in self._folder.glob("*"):
                with suppress(OSError):  # it is not empty, or gone
                    if run.stat().st_mtime < time.time() - self._expire_s:
                        run.rmdir()
        except OSError as error:  # no reason to fail a request
            logger.warning("finished latents in %s are not evicted: %s", self._folder, error)

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield the modification time, bytes and path of each file."""
        for path in self._folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # renamed or dropped meanwhile
                continue
            yield status.st_mtime, status.st_size, path


def _is_whole(path: Path) -> bool:
    """Return whether a file is complete: its writer has neither died nor is still at work."""
    return not path.name.startswith(TEMPORARY)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
