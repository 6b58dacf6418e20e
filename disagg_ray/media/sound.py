"""Sound that goes with a video, and files of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

Samples = np.ndarray[Any, np.dtype[np.float32]]
"""Shape (channels, num_samples), in [-1, 1]."""

IEEE_FLOAT = 3
"""Kind of samples in a wav file."""


@dataclass(frozen=True)
class Sound:
    """Samples of one or more channels."""

    samples: Samples
    rate: int
    """Samples a second."""

    @property
    def seconds(self) -> float:
        return float(self.samples.shape[1] / self.rate)

    def interleaved(self) -> bytes:
        """Return the samples as little-endian float32, channel after channel of each moment."""
        return np.ascontiguousarray(self.samples.T, "<f4").tobytes()

    def to_wav(self) -> bytes:
        """Return a wav file of the samples as they are, float32."""
        channels, num_samples = self.samples.shape
        width, data = 4 * channels, self.interleaved()
        form = struct.pack("<HHIIHHH", IEEE_FLOAT, channels, self.rate, self.rate * width, width, 32, 0)
        body = b"WAVE" + _chunk(b"fmt ", form) + _chunk(b"fact", struct.pack("<I", num_samples)) + _chunk(b"data", data)
        return _chunk(b"RIFF", body)


def read_wav(file: bytes) -> Sound:
    """Return the sound of a file that `Sound.to_wav` made."""
    chunks, position = {}, 12
    while position < len(file):
        name, length = struct.unpack_from("<4sI", file, position)
        chunks[name] = file[position + 8 : position + 8 + length]
        position += 8 + length
    _, channels, rate = struct.unpack_from("<HHI", chunks[b"fmt "])
    samples = np.frombuffer(chunks[b"data"], "<f4").reshape(-1, channels).T
    return Sound(np.ascontiguousarray(samples, np.float32), rate)


def wav_beside(output: str) -> str:
    """Return the path or URL of the sound of raw frames at a path or URL: the same name with another suffix."""
    name = output.rstrip("/")
    return name.removesuffix(PurePosixPath(name).suffix) + ".wav"


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content
