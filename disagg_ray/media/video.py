"""Images in, video out: the only place that imports imageio and Pillow."""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from disagg_ray.environment import expand_home
from disagg_ray.errors import EncodeError, RequestError
from disagg_ray.media import libtiff
from disagg_ray.media.mp4 import MAX_SIDE, encode_mp4
from disagg_ray.media.sound import Sound

ImageSource = Image.Image | str | Path
"""An image, or the path of an image file."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""Shape (height, width, 3)."""

Picture = Image.Image | np.ndarray[Any, np.dtype[np.uint8]]
"""What of a request is pixels: an image; or a video's frames, or several images, packed into one array."""

Frames = np.ndarray[Any, np.dtype[np.float32]]
"""Shape (num_frames, height, width, 3), in [0, 1]."""


@dataclass(frozen=True)
class Clip:
    """A decoded video."""

    frames: Frames
    sound: Sound | None = None


MAX_IMAGE_BYTES = 256 * 2**20
"""A conditioning image file larger than this is refused unread."""

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", *(("AVIF",) if features.check("avif") else ()))
"""Pillow knows others, some of which start programs to decode; AVIF since 11.3."""

PILLOW_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError)
"""What its readers raise, given a broken file."""

TRY_S = 60.0
"""For one small frame, on a machine that is busy."""

MAX_GIF_FPS = 50
"""Browsers slow a gif down whose frames last less than its two smallest units, 10 ms each."""

MAX_SIDES = {"mp4": MAX_SIDE, "gif": 65_535, "webp": 16_383, "jpg": 65_535}
"""The most pixels that a file of a format has of either side."""

IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}), "webp": ("WEBP", {"lossless": True}), "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
}  # fmt: skip
"""Formats of one image: Pillow's name, and how it is to write."""

ENCODE_S = 600.0
"""The most seconds that a video file may come no further."""


def load_image(source: ImageSource, field: str, max_pixels: int) -> Image.Image:
    """Return an image upright (EXIF rotation applied) and RGB of 8 bits; its alpha, if any, is dropped.

    Equal to diffusers' `load_image`, except that grey of 16 bits keeps its upper 8: there all above 255 becomes white.
    Which colour of a palette is transparent is lost too: stock's image encoders, not its VAEs, see that one as white.

    Raises:
        RequestError: missing, unreadable, truncated, or larger than `max_pixels` by its header, before it is decoded.
    """
    if not isinstance(source, (Image.Image, str, Path)):
        raise RequestError(f"{field}: it is a {type(source).__name__}; give a file or a PIL image")
    shown = "the image" if isinstance(source, Image.Image) else repr(str(source))
    libtiff.silence()
    try:
        if isinstance(source, Image.Image):
            return upright(source, field, max_pixels, shown)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # many pixels are checked below, and strange tags do no harm
            with Image.open(_file(expand_home(source), field, shown), formats=IMAGE_FORMATS) as image:
                return upright(image, field, max_pixels, shown)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(f"{field}: {shown} is over limits.max_image_pixels={max_pixels}") from error
    except UnidentifiedImageError as error:
        raise RequestError(
            f"{field}: {shown} cannot be read as an image; give a whole file of {', '.join(IMAGE_FORMATS)}"
        ) from error
    except PILLOW_ERRORS as error:
        raise RequestError(f"{field}: {shown} cannot be read as an image: {error}") from error


def blank(width: int, height: int) -> Image.Image:
    """Return an image of one grey, where any will do."""
    return Image.new("RGB", (width, height), (128, 128, 128))


def check_image_file(source: ImageSource, field: str) -> None:
    """Check that an image is a file that can be read, without opening it.

    Raises:
        RequestError: it is not there, not a regular file, unreadable or too large.
    """
    if isinstance(source, Image.Image):
        return
    shown = repr(str(source))
    try:
        if not os.access(_file(expand_home(source), field, shown), os.R_OK):
            raise RequestError(f"{field}: {shown} may not be read by this user")
    except OSError as error:
        raise RequestError(f"{field}: {shown} cannot be read: {error}") from error


def _file(path: Path, field: str, shown: str) -> Path:
    if not path.is_file():
        several = "; give several files one by one, as a flag once for each" if "[" in field and "," in shown else ""
        raise RequestError(f"{field}: {shown} is not a file{several}")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise RequestError(f"{field}: {shown} is over {MAX_IMAGE_BYTES} bytes; give a smaller one")
    return path


def check_size(image: Image.Image, field: str, max_pixels: int, shown: str) -> None:
    """Refuse an image that is larger than `max_pixels` by its header."""
    if not 0 < image.width * image.height <= max_pixels:
        raise RequestError(
            f"{field}: {shown} has {image.width}x{image.height} pixels, not from 1 to "
            f"limits.max_image_pixels={max_pixels}"
        )


def upright(image: Image.Image, field: str, max_pixels: int, shown: str) -> Image.Image:
    """Return an opened image, or its present frame, as `load_image` does; Pillow's errors are the caller's."""
    check_size(image, field, max_pixels, shown)
    if image.mode in ("I", "F"):
        raise RequestError(f"{field}: {shown} has 32-bit pixels, whose range is not known; give 8 or 16 bits")
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I;16"):  # Pillow would clip it at 255
        turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    return turned.convert("RGB")


def to_array(image: Picture) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image's pixels, uint8 of shape (height, width, 3); what is pixels already stays as it is."""
    return np.array(image, dtype=np.uint8) if isinstance(image, Image.Image) else image


def digest_pixels(image: Picture) -> str:
    """Return the sha256 of size and pixels: equal for equal pictures, whatever file they came from."""
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()
    digest = hashlib.sha256(f"{image.shape} ".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def to_image(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Image.Image:
    """Return the image of pixels, uint8 of shape (height, width, 3)."""
    return Image.fromarray(pixels)


def encode(
    frames: Frames,
    fps: int,
    format: str,
    scale: int = 1,
    *,
    sound: Sound | None = None,
    timeout_s: float = ENCODE_S,
    on_frame: Callable[[], None] = lambda: None,
) -> bytes:
    """Return frames as an mp4 (H.264, yuv420p) or gif file, or the only one as an image, enlarged by a whole number.

    An mp4 holds the sound (AAC), no other format does; `wav` is the sound alone, as it is.

    One frame after the other is made 8 bits wide, and `on_frame` is called when it was taken. Nothing is waited for
    longer than `timeout_s` without coming further.

    Raises:
        EncodeError: the file could not be made whole.
    """
    if format == "wav":
        assert sound is not None, "only what has sound is asked for it"
        return sound.to_wav()
    height, width = (side * scale for side in frames.shape[1:3])
    if max(height, width) > MAX_SIDES.get(format, math.inf) or (format == "mp4" and (height % 2 or width % 2)):
        raise EncodeError(f"{format}: it holds no frames of {width}x{height}")
    pixels = (quantise(frame).repeat(scale, axis=0).repeat(scale, axis=1) for frame in frames)
    if format in IMAGES:
        return _encode_image(next(pixels), format)
    if format == "gif":
        return _encode_gif(pixels, fps, len(frames), on_frame)
    return encode_mp4(pixels, fps, timeout_s, on_frame, sound)


@cache
def check_writer(format: str) -> None:
    """Encode a small frame, once in this process, so that what is missing shows before any work.

    Raises:
        EncodeError: no file of this format can be made here.
    """
    if format in MAX_SIDES or format in IMAGES:
        encode(np.zeros((1, 16, 16, 3), np.float32), 1, format, timeout_s=TRY_S)


def _encode_image(pixels: Pixels, format: str) -> bytes:
    file = io.BytesIO()
    name, options = IMAGES[format]
    Image.fromarray(pixels).save(file, name, **options)
    return file.getvalue()


def _encode_gif(pixels: Iterator[Pixels], fps: int, num_frames: int, on_frame: Callable[[], None]) -> bytes:
    ends = [round(100 * (index + 1) / fps) for index in range(num_frames)]  # a gif counts in 10 ms
    lasts = [10 * (end - start) for start, end in pairwise([0, *ends])]

    def images() -> Iterator[Image.Image]:
        for frame in pixels:
            yield Image.fromarray(frame)
            on_frame()

    others, file = images(), io.BytesIO()
    durations = lasts if num_frames > 1 else lasts[0]  # Pillow takes no list of one
    next(others).save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return file.getvalue()


def load_video(path: str | Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the frames of a video file, uint8 of shape (num_frames, height, width, 3)."""
    return np.asarray(iio.imread(path, plugin="FFMPEG"), dtype=np.uint8)


def make_thumbnail(made: bytes, format: str) -> bytes:
    """Return an image, or the first frame of an mp4 file, as a WebP file."""
    buffer = io.BytesIO()
    if format in IMAGES:
        Image.open(io.BytesIO(made), formats=[IMAGES[format][0]]).save(buffer, format="WEBP")
        return buffer.getvalue()
    frame = iio.imread(made, index=0, plugin="FFMPEG", extension=".mp4")
    Image.fromarray(np.asarray(frame, dtype=np.uint8)).save(buffer, format="WEBP")
    return buffer.getvalue()


def encode_png(frame: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    """Return one frame as a png file."""
    return _encode_image(quantise(frame), "png")


def quantise(frames: Frames) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Round frames in [0, 1] to 8 bits, as diffusers' `numpy_to_pil` does."""
    return np.asarray((frames * 255).round().clip(0, 255), dtype=np.uint8)
