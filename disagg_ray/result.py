"""What a user gets: the video, and where its time went."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path

from disagg_ray.errors import OutputError
from disagg_ray.media.output import rescue, write
from disagg_ray.media.video import Frames
from disagg_ray.request import ResolvedRequest


@dataclass(frozen=True)
class StageTiming:
    """Where one stage's share of a request's time went, in seconds."""

    stage: str
    replica: str
    queue_s: float
    """In the driver, until a replica took it."""
    pull_s: float
    """Reserving memory and pulling tensors in."""
    started: float
    """When computing began, in seconds since the epoch, by the replica's clock."""
    compute_s: float
    publish_s: float
    """Copying outputs into the pool."""
    pulled_bytes: int
    route: str
    """How the tensors came: Mooncake's protocol, or `local`."""
    peak_bytes: int
    """Most GPU memory the replica has ever held, weights, pool and what lay free in it included; 0 on a CPU."""
    encode_s: float = 0.0
    """Encoding the file, after which it is on its way; the replica may compute the next request meanwhile."""
    attempts: int = 1
    """Times the stage was begun for this request, this one included."""


@dataclass(frozen=True)
class Result:
    """A finished video."""

    request: ResolvedRequest
    seconds: float
    """From admission to the last byte."""
    stages: tuple[StageTiming, ...]
    data: bytes | None = field(repr=False)
    """The encoded file, for mp4 and gif."""
    frames: Frames | None = field(repr=False)
    """Frames of shape (num_frames, height, width, 3) in [0, 1], for png and npy."""

    def save(self, path: str | Path, *, overwrite: bool = True) -> Path | str:
        """Write the video: a file, a folder of images for png, or any fsspec URL. Never leaves half a file.

        Raises:
            OutputError: the suffix is not the request's format, or the place cannot be written.
        """
        return write(self._content, self.request.format, path, overwrite=overwrite)

    def rescue(self) -> Path:
        """Write the video into a new private folder of this machine: the temporary one, or where else there is room.

        Raises:
            OutputError: no place takes it.
        """
        return rescue(self._content, self.request.format)

    @property
    def _content(self) -> bytes | Frames:
        content = self.frames if self.data is None else self.data
        assert content is not None, "a result holds either the file or the frames"
        return content


def rescued(result: Result) -> str:
    """Write a video that its own place did not take elsewhere; return words that say where."""
    try:
        return f"the video is {str(result.rescue())!r} on {platform.node()} instead"
    except OutputError as error:
        return str(error)
