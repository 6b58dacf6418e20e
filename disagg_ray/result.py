"""What a user gets: the video, and the time that each stage took."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path

from disagg_ray.errors import OutputError
from disagg_ray.media.output import rescue, write
from disagg_ray.media.places import check_output
from disagg_ray.media.sound import Sound, wav_beside
from disagg_ray.media.video import Frames
from disagg_ray.request import ResolvedRequest


@dataclass(frozen=True)
class StageTiming:
    """Times of one stage for one request, in seconds."""

    stage: str
    replica: str
    queue_s: float
    """In the driver's queue."""
    pull_s: float
    """Reserving memory and pulling the inputs."""
    started: float
    """When computing started, in seconds since the epoch, by the replica's clock."""
    compute_s: float
    publish_s: float
    """Copying outputs into the pool."""
    pulled_bytes: int
    route: str
    """Route of the inputs: Mooncake's protocol, or `local`."""
    peak_bytes: int
    """Peak VRAM that the replica has reserved, weights and pool included; 0 on a CPU."""
    encode_s: float = 0.0
    """Encoding the file; meanwhile the replica may compute the next request."""
    attempts: int = 1
    """Attempts at the stage that a replica started, this one included."""
    num_ranks: int = 1
    """Processes of the replica, which computed it together; times and memory are those of the first."""
    num_gpus: float = 0.0
    """GPUs that these have reserved, together."""


@dataclass(frozen=True)
class Result:
    """A finished video."""

    request: ResolvedRequest
    seconds: float
    """From admission to the last byte."""
    stages: tuple[StageTiming, ...]
    data: bytes | None = field(repr=False)
    """The encoded file; None for frames and npy."""
    frames: Frames | None = field(repr=False)
    """Frames of shape (num_frames, height, width, 3) in [0, 1], for frames and npy."""
    sound: Sound | None = field(default=None, repr=False)
    """For npy, of a model that makes some."""

    def save(self, path: str | Path, *, overwrite: bool = True) -> Path | str:
        """Write the video: a file, a folder of images for frames, or any fsspec URL. Never leaves a partial file.

        Sound lies beside raw frames, in a file of the same name that ends in `.wav`; the frames' path is returned.

        Raises:
            OutputError: the suffix is not the request's format, or the place cannot be written.
        """
        beside = wav_beside(str(path))
        if self.sound is not None:
            check_output(beside, overwrite=overwrite)
        written = write(self._content, self.request.format, path, overwrite=overwrite)
        if self.sound is not None:
            write(self.sound.to_wav(), "wav", beside, overwrite=overwrite)
        return written

    def rescue(self) -> Path:
        """Write the video into a new private folder on this machine, in the temporary folder or where there is space.

        Raises:
            OutputError: there is no space for it.
        """
        sound: dict[str, bytes | Frames] = {} if self.sound is None else {"wav": self.sound.to_wav()}
        return rescue({self.request.format: self._content, **sound})

    @property
    def _content(self) -> bytes | Frames:
        content = self.frames if self.data is None else self.data
        assert content is not None, "a result holds either the file or the frames"
        return content


def rescued(result: Result) -> str:
    """Write a result that could not be saved as asked to another place; return the message that names it."""
    try:
        path = str(result.rescue())
    except OutputError as error:
        return str(error)
    sound = f", and its sound {wav_beside(path)!r}," if result.sound else ""
    return f"the file is {path!r}{sound} on {platform.node()} instead"
