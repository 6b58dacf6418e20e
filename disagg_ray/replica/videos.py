"""Decoded videos at a replica that have not been fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable

from disagg_ray.media.video import Clip
from disagg_ray.replica.sizing import MAX_VIDEOS
from disagg_ray.transfer.handoff import AttemptKey


class Videos:
    """Thread-safe. Clips by the task that decoded them; they take the host's memory."""

    def __init__(self) -> None:
        self._clips: dict[AttemptKey, Clip] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, key: AttemptKey) -> Clip:
        return self._clips[key]

    def add(self, key: AttemptKey, clip: Clip) -> None:
        self._clips[key] = clip

    def drop(self, key: AttemptKey) -> None:
        """Drop a task's clip, if there is one; have `wait_for_room` look again."""
        with self._changed:
            self._clips.pop(key, None)
            self._changed.notify_all()

    def wait_for_room(self, is_cancelled: Callable[[], bool]) -> None:
        """Wait while there are `MAX_VIDEOS`, unless cancelled; an encode that hangs ends with the replica."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._clips) < MAX_VIDEOS or is_cancelled())
