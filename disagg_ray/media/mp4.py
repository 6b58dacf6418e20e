"""Encodes frames as H.264, one by one, with imageio's ffmpeg, and checks the file by its index."""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import IO, Any

import imageio_ffmpeg
import numpy as np

from disagg_ray.errors import EncodeError
from disagg_ray.media.sound import Sound
from disagg_ray.text import printable

MAX_SIDE = 16_384
"""Largest side of H.264 (libx264)."""

H264 = ("-crf", "17", "-threads", "1", "-bitexact", "-fflags", "+bitexact", "-flags:v", "+bitexact",
        "-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709", "-movflags", "+faststart")  # fmt: skip
"""One encoder thread and bit-exact flags: equal frames give equal bytes. Players take untagged HD for BT.709."""

AAC_BITS = "192k"
"""Bits a second of sound."""
AAC_S = 0.2
"""Seconds by which a track may be longer or shorter than its samples: AAC holds 1024 at once, and some before them."""

_Process = subprocess.Popen[bytes]

END_S = 10.0
"""Until a killed process has ended."""
MAX_WORDS = 500
"""Characters of ffmpeg's output in an error, from its end."""


def encode_mp4(
    pixels: Iterable[np.ndarray[Any, np.dtype[np.uint8]]],
    fps: int,
    timeout_s: float,
    on_frame: Callable[[], None],
    sound: Sound | None = None,
) -> bytes:
    """Return the file of frames, each of shape (height, width, 3), both even and MAX_SIDE at most, and of sound (AAC).

    The file is made in memory, so no folder can be full. ffmpeg ends with this call, whatever it does.

    Raises:
        EncodeError: ffmpeg is missing, failed, took no frame or did not end for `timeout_s`, or made another file.
    """
    with _memory("video") as video, _memory("words") as words, _memory("sound") as samples:
        if sound is not None:
            samples.write(sound.interleaved())
            samples.flush()
        encoder, num_frames, size = None, 0, (0, 0)
        try:
            with suppress(BrokenPipeError):  # its exit status says more
                for frame in pixels:
                    if encoder is None:
                        size = frame.shape[1], frame.shape[0]
                        encoder = _start(size, fps, _heard(sound, samples), (video, samples), words)
                    _feed(encoder, frame, time.monotonic() + timeout_s)
                    num_frames += 1
                    on_frame()
            _finish(encoder, timeout_s)
            data = _content(video)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise EncodeError(f"ffmpeg hangs: nothing for {timeout_s:g} s after frame {num_frames}") from None
        except (OSError, subprocess.CalledProcessError) as error:
            raise EncodeError(f"ffmpeg failed after frame {num_frames}: {_reason(error, _content(words))}") from error
        finally:
            _end(encoder)
    _check(data, num_frames, size, sound)
    return data


def _memory(name: str) -> IO[bytes]:
    return open(os.memfd_create(name), "w+b")  # noqa: PTH123 - it has no path


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _heard(sound: Sound | None, samples: IO[bytes]) -> tuple[list[str], list[str]]:
    """Return ffmpeg's arguments for sound: as it comes, and as it is to be."""
    if sound is None:
        return [], ["-an"]
    come = ["-f", "f32le", "-ar", str(sound.rate), "-ac", str(len(sound.samples))]
    return [*come, "-i", f"/proc/self/fd/{samples.fileno()}"], ["-acodec", "aac", "-b:a", AAC_BITS]


def _start(
    size: tuple[int, int],
    fps: int,
    heard: tuple[list[str], list[str]],
    files: tuple[IO[bytes], IO[bytes]],
    words: IO[bytes],
) -> _Process:
    """Start ffmpeg, which writes the first of the files and may read the second; `heard` is arguments for sound."""
    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise EncodeError(f"there is no ffmpeg: {error}") from error
    raw = ["-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{size[0]}x{size[1]}", "-pix_fmt", "rgb24", "-r", str(fps)]
    made = [*heard[1], "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-v", "error", *H264, "-f", "mp4"]
    encoder = subprocess.Popen(
        [ffmpeg, "-y", *raw, "-i", "-", *heard[0], *made, f"/proc/self/fd/{files[0].fileno()}"],
        stdin=subprocess.PIPE, stdout=words, stderr=words, bufsize=0,
        pass_fds=[file.fileno() for file in files],
        process_group=0,  # Ctrl-C is for us
    )  # fmt: skip
    assert encoder.stdin is not None
    os.set_blocking(encoder.stdin.fileno(), False)
    return encoder


def _feed(encoder: _Process, frame: np.ndarray[Any, np.dtype[np.uint8]], deadline: float) -> None:
    assert encoder.stdin is not None
    rest, poll = np.ascontiguousarray(frame).data.cast("B"), select.poll()
    poll.register(encoder.stdin, select.POLLOUT)
    while rest:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poll.poll(1000 * remaining):
            raise TimeoutError
        rest = rest[encoder.stdin.write(rest) or 0 :]


def _finish(encoder: _Process | None, timeout_s: float) -> None:
    if encoder is None:
        raise EncodeError("there is no frame to encode")
    assert encoder.stdin is not None
    encoder.stdin.close()
    if status := encoder.wait(timeout_s):
        raise subprocess.CalledProcessError(status, "ffmpeg")


def _end(encoder: _Process | None) -> None:
    if encoder is not None:
        assert encoder.stdin is not None
        encoder.kill()
        encoder.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # the system waits for a disk; it ends it then
            encoder.wait(END_S)


def _reason(error: OSError | subprocess.CalledProcessError, words: bytes) -> str:
    said = printable(" ".join(words.decode(errors="replace").split())[-MAX_WORDS:], MAX_WORDS)
    status = getattr(error, "returncode", 0)
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}" if status else str(error)
    return f"{how}: {said}" if said else how


def _check(data: bytes, num_frames: int, size: tuple[int, int], sound: Sound | None) -> None:
    """Check by its index that a file has all frames, of the right size, and all of the sound.

    Raises:
        EncodeError: it is cut short, or holds other frames.
    """
    try:
        boxes = dict(_boxes(memoryview(data)))
        tracks = [_track(content) for name, content in _boxes(boxes[b"moov"]) if name == b"trak"]
        boxes |= next(track for track in tracks if b"vmhd" in track)
        same, num_found, *lengths = struct.iter_unpack(">I", boxes[b"stsz"][4:])
        nbytes = same[0] * num_found[0] or sum(length for (length,) in lengths)
        width, height = (side >> 16 for side in struct.unpack(">2I", boxes[b"tkhd"][-8:]))
        heard_s = sum(_seconds(track[b"mdhd"]) for track in tracks if b"smhd" in track)
    except (KeyError, StopIteration, ValueError, struct.error) as error:
        raise EncodeError(f"ffmpeg made {len(data)} bytes that are no whole mp4: {error}") from error
    found = f"{num_found[0]} frames of {width}x{height}"
    if nbytes > len(boxes[b"mdat"]) or found != (wanted := f"{num_frames} frames of {size[0]}x{size[1]}"):
        raise EncodeError(f"ffmpeg made {nbytes} bytes, {found}, instead of {wanted}")
    if abs(heard_s - (sound_s := sound.seconds if sound is not None else 0.0)) > AAC_S:
        raise EncodeError(f"ffmpeg made {heard_s:.2f} s of sound, instead of {sound_s:.2f} s")


def _track(content: memoryview) -> dict[bytes, memoryview]:
    """Return the boxes of a track, at every depth, by name."""
    boxes = dict(_boxes(content))
    for name in (b"mdia", b"minf", b"stbl"):
        boxes |= dict(_boxes(boxes[name]))
    return boxes


def _seconds(header: memoryview) -> float:
    """Return how long the track of an mdhd box lasts."""
    rate, length = struct.unpack(">IQ", header[20:32]) if header[0] else struct.unpack(">2I", header[12:20])
    return float(length / rate)


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the name and the content of each box of an mp4."""
    while data:
        (length, name), head = struct.unpack(">I4s", data[:8]), 8
        if length == 1:
            (length,), head = struct.unpack(">Q", data[8:16]), 16
        if not head <= length <= len(data):
            raise ValueError(f"box {name!r} of {length} bytes is not whole")
        yield name, data[head:length]
        data = data[length:]
