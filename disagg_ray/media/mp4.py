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
from disagg_ray.text import printable

MAX_SIDE = 16_384
"""Largest side of H.264 (libx264)."""

H264 = ("-crf", "17", "-threads", "1", "-bitexact", "-fflags", "+bitexact", "-flags:v", "+bitexact",
        "-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709", "-movflags", "+faststart")  # fmt: skip
"""One encoder thread and bit-exact flags: equal frames give equal bytes. Players take untagged HD for BT.709."""

_Process = subprocess.Popen[bytes]

END_S = 10.0
"""Until a killed process has ended."""
MAX_WORDS = 500
"""Characters of ffmpeg's output in an error, from its end."""


def encode_mp4(
    pixels: Iterable[np.ndarray[Any, np.dtype[np.uint8]]], fps: int, timeout_s: float, on_frame: Callable[[], None]
) -> bytes:
    """Return the file of frames, each of shape (height, width, 3), both even and MAX_SIDE at most.

    The file is made in memory, so no folder can be full. ffmpeg ends with this call, whatever it does.

    Raises:
        EncodeError: ffmpeg is missing, failed, took no frame or did not end for `timeout_s`, or made another file.
    """
    with _memory("video") as video, _memory("words") as words:
        encoder, num_frames, size = None, 0, (0, 0)
        try:
            with suppress(BrokenPipeError):  # its exit status says more
                for frame in pixels:
                    if encoder is None:
                        size = frame.shape[1], frame.shape[0]
                        encoder = _start(size, fps, video, words)
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
    _check(data, num_frames, size)
    return data


def _memory(name: str) -> IO[bytes]:
    return open(os.memfd_create(name), "w+b")  # noqa: PTH123 - it has no path


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _start(size: tuple[int, int], fps: int, video: IO[bytes], words: IO[bytes]) -> _Process:
    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise EncodeError(f"there is no ffmpeg: {error}") from error
    raw = ["-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{size[0]}x{size[1]}", "-pix_fmt", "rgb24", "-r", str(fps)]
    made = ["-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-v", "error", *H264, "-f", "mp4"]
    encoder = subprocess.Popen(
        [ffmpeg, "-y", *raw, "-i", "-", *made, f"/proc/self/fd/{video.fileno()}"],
        stdin=subprocess.PIPE, stdout=words, stderr=words, pass_fds=[video.fileno()], bufsize=0,
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


def _check(data: bytes, num_frames: int, size: tuple[int, int]) -> None:
    """Check by its index that a file has all frames, of the right size.

    Raises:
        EncodeError: it is cut short, or holds other frames.
    """
    try:
        boxes = dict(_boxes(memoryview(data)))
        for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
            boxes |= dict(_boxes(boxes[name]))
        same, num_found, *lengths = struct.iter_unpack(">I", boxes[b"stsz"][4:])
        nbytes = same[0] * num_found[0] or sum(length for (length,) in lengths)
        width, height = (side >> 16 for side in struct.unpack(">2I", boxes[b"tkhd"][-8:]))
    except (KeyError, ValueError, struct.error) as error:
        raise EncodeError(f"ffmpeg made {len(data)} bytes that are no whole mp4: {error}") from error
    found = f"{num_found[0]} frames of {width}x{height}"
    if nbytes > len(boxes[b"mdat"]) or found != (wanted := f"{num_frames} frames of {size[0]}x{size[1]}"):
        raise EncodeError(f"ffmpeg made {nbytes} bytes, {found}, instead of {wanted}")


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
