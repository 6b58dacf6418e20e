"""Videos in: the frames of a file or of a folder of images, one after the other, as untrusted as images are."""

from __future__ import annotations

import os
import select
import subprocess
import warnings
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from disagg_ray.environment import expand_home
from disagg_ray.errors import RequestError
from disagg_ray.media import libtiff
from disagg_ray.media.video import (
    IMAGE_FORMATS,
    PILLOW_ERRORS,
    ImageSource,
    Pixels,
    check_image_file,
    check_size,
    load_image,
    upright,
)
from disagg_ray.text import printable

DECODE_S = 60.0
"""The most seconds that a decoder may come no further."""
SUFFIXES = (".avif", ".bmp", ".gif", ".jpg", ".jpeg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the frames in a folder."""


def read_frames(source: ImageSource, field: str, max_pixels: int) -> Generator[Image.Image]:
    """Yield the frames of an image, a file (mp4, or what Pillow reads) or a folder, upright and RGB.

    A folder's images are frames in the order of their names. No more is decoded than is asked for.

    Raises:
        RequestError: missing, unreadable, cut short, no video, or with frames larger than `max_pixels`.
    """
    if isinstance(source, Image.Image):
        yield load_image(source, field, max_pixels)
        return
    if not isinstance(source, (str, Path)):
        raise RequestError(f"{field}: it is a {type(source).__name__}; give the path of a video or of a folder")
    check_clip(source, field)
    path = expand_home(source)
    if path.is_dir():
        for file in _files(path, field):
            yield load_image(file, field, max_pixels)
    elif _is_mp4(path, field):
        yield from _decode_mp4(path, field, max_pixels)
    else:
        yield from _read_pillow(path, field, max_pixels)


def resize(frame: Image.Image, height: int, width: int, *, grey: bool = False) -> Pixels:
    """Return an RGB frame's pixels in another size, as diffusers resizes it; grey: of shape (height, width)."""
    image = frame.convert("L") if grey else frame
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.uint8)


def check_clip(source: ImageSource, field: str) -> None:
    """Check that a video is a file or a folder of files that can be read, without opening any.

    Raises:
        RequestError: it is not there, unreadable or too large.
    """
    if isinstance(source, Image.Image):
        return
    shown = repr(str(source))
    try:
        if source == "" or not (path := expand_home(source)).is_dir():  # a Path of nothing is this folder
            check_image_file(source, field)
        elif not os.access(path, os.R_OK | os.X_OK):
            raise RequestError(f"{field}: {shown} may not be read by this user")
        elif not _files(path, field):
            raise RequestError(f"{field}: {shown} holds no images; give a folder of frames ({', '.join(SUFFIXES)})")
    except OSError as error:
        raise RequestError(f"{field}: {shown} cannot be read: {error}") from error


def _files(folder: Path, field: str) -> list[Path]:
    """Return a folder's frames in the order of their names."""
    try:
        return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    except OSError as error:
        raise RequestError(f"{field}: {str(folder)!r} cannot be read: {error}") from error


def _is_mp4(path: Path, field: str) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise RequestError(f"{field}: {str(path)!r} cannot be read: {error}") from error
    return head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"avis")


def _read_pillow(path: Path, field: str, max_pixels: int) -> Iterator[Image.Image]:
    shown = repr(str(path))
    libtiff.silence()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                check_size(image, field, max_pixels, shown)
                for frame in ImageSequence.Iterator(image):
                    yield upright(frame, field, max_pixels, shown)
    except Image.DecompressionBombError as error:
        raise RequestError(f"{field}: {shown} is over limits.max_image_pixels={max_pixels}") from error
    except UnidentifiedImageError as error:
        raise RequestError(
            f"{field}: {shown} cannot be read as a video; give a whole mp4, {', '.join(IMAGE_FORMATS)}, or a folder of "
            f"images"
        ) from error
    except PILLOW_ERRORS as error:
        raise RequestError(f"{field}: {shown} cannot be read as a video: {error}") from error


def _decode_mp4(path: Path, field: str, max_pixels: int) -> Iterator[Image.Image]:
    """Yield the frames of an mp4, which ffmpeg reads as nothing else and with no other file; it ends with this call."""
    shown = repr(str(path))
    command = [
        "-v", "error", "-xerror", "-max_pixels", str(max_pixels), "-protocol_whitelist", "file", "-f", "mov",
        "-i", "-", "-map", "0:v:0", "-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm",
        "-pix_fmt", "rgb24", "pipe:1",  # of more bits ffmpeg would make ppm of 16
    ]  # fmt: skip
    with path.open("rb") as file, open(os.memfd_create("words"), "w+b") as words:  # noqa: PTH123 - it has no path
        command[command.index("-i") + 1] = f"file:/proc/self/fd/{file.fileno()}"
        decoder = subprocess.Popen(
            [_ffmpeg(field), *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words,
            pass_fds=[file.fileno()], process_group=0,
        )  # fmt: skip
        assert decoder.stdout is not None
        try:
            yield from _images(decoder.stdout, shown, field, max_pixels)
            status = decoder.wait(DECODE_S)
        except (EOFError, ValueError, subprocess.TimeoutExpired):
            status = -1
        finally:
            decoder.kill()
            decoder.stdout.close()
            with suppress(subprocess.TimeoutExpired):
                decoder.wait(DECODE_S)
        if status:
            words.seek(0)
            said = printable(" ".join(words.read(2000).decode(errors="replace").split()), 200)
            if "max pixel count" in said:
                raise RequestError(f"{field}: {shown} has more pixels than limits.max_image_pixels={max_pixels}")
            raise RequestError(f"{field}: {shown} cannot be read as a video; give a whole mp4: {said or 'cut short'}")


def _ffmpeg(field: str) -> str:
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise RequestError(
            f"{field}: an mp4 needs ffmpeg, and there is none: {error}; give a folder of images"
        ) from error


def _images(pipe: IO[bytes], shown: str, field: str, max_pixels: int) -> Iterator[Image.Image]:
    """Yield PPM images (`P6`, width and height, 255, each on a line, then RGB of 8 bits) until the pipe ends.

    Raises:
        EOFError: within an image.
        ValueError: these are no such images.
    """
    reader = _Reader(pipe, f"{field}: {shown}")
    while magic := reader.line():
        width, height = map(int, reader.line().split())
        if magic != b"P6" or reader.line() != b"255":
            raise ValueError
        if width * height > max_pixels:
            raise RequestError(
                f"{field}: {shown} has {width}x{height} pixels, not from 1 to limits.max_image_pixels={max_pixels}"
            )
        yield Image.frombytes("RGB", (width, height), reader.exactly(3 * width * height))


class _Reader:
    """Reads a pipe, and waits for no piece of it longer than DECODE_S."""

    def __init__(self, pipe: IO[bytes], about: str) -> None:
        self._file, self._about = pipe.fileno(), about
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)

    def line(self) -> bytes:
        """Return the next line; empty where the pipe ends."""
        while b"\n" not in self._buffer:
            if not self._fill():
                return b""
        line = bytes(self._buffer[:64]).partition(b"\n")[0]
        del self._buffer[: len(line) + 1]
        return line

    def exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._fill():
                raise EOFError
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _fill(self) -> bool:
        if not self._poll.poll(1000 * DECODE_S):
            raise RequestError(f"{self._about} cannot be read: ffmpeg hangs, nothing for {DECODE_S:g} s")
        piece = os.read(self._file, 2**20)
        self._buffer += piece
        return bool(piece)
