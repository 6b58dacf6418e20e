"""Images in, video out: the only place that imports imageio and Pillow."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps

from disagg_ray.environment import expand_home
from disagg_ray.errors import RequestError

Frames = np.ndarray[Any, np.dtype[np.float32]]
"""Shape (num_frames, height, width, 3), in [0, 1]."""

MAX_IMAGE_BYTES = 256 * 2**20
"""A conditioning image file larger than this is refused unread."""

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow knows others, some of which start programs to decode."""

MAX_GIF_FPS = 50
"""Browsers slow a gif down whose frames last less than its two smallest units, 10 ms each."""

H264 = ("-crf", "17", "-threads", "1", "-bitexact", "-fflags", "+bitexact", "-flags:v", "+bitexact",
        "-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709", "-movflags", "+faststart")  # fmt: skip
"""One encoder thread and bit-exact flags: equal frames give equal bytes. Players take untagged HD for BT.709."""


def load_image(source: Image.Image | str | Path, field: str, max_pixels: int) -> Image.Image:
    """Return an image upright (EXIF rotation applied) and RGB of 8 bits; its alpha, if any, is dropped.

    Raises:
        RequestError: missing, unreadable, truncated, or larger than `max_pixels` by its header, before it is decoded.
    """
    if not isinstance(source, (Image.Image, str, Path)):
        raise RequestError(f"{field}: it is a {type(source).__name__}; give a file or a PIL image")
    shown = "the image" if isinstance(source, Image.Image) else repr(str(source))
    try:
        if isinstance(source, Image.Image):
            return _upright(source, field, max_pixels, shown)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the pixel check below is ours
            with Image.open(_file(expand_home(source), field, shown), formats=IMAGE_FORMATS) as image:
                return _upright(image, field, max_pixels, shown)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(f"{field}: {shown} is over limits.max_image_pixels={max_pixels}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise RequestError(f"{field}: {shown} cannot be read as an image: {error}") from error


def blank(width: int, height: int) -> Image.Image:
    """Return an image of one grey, where any will do."""
    return Image.new("RGB", (width, height), (128, 128, 128))


def check_image_file(source: Image.Image | str | Path, field: str) -> None:
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
        raise RequestError(f"{field}: {shown} is not a file")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise RequestError(f"{field}: {shown} is over {MAX_IMAGE_BYTES} bytes; give a smaller one")
    return path


def _upright(image: Image.Image, field: str, max_pixels: int, shown: str) -> Image.Image:
    if not 0 < image.width * image.height <= max_pixels:
        raise RequestError(
            f"{field}: {shown} has {image.width}x{image.height} pixels, not from 1 to "
            f"limits.max_image_pixels={max_pixels}"
        )
    if image.mode in ("I", "F"):
        raise RequestError(f"{field}: {shown} has 32-bit pixels, whose range is not known; give 8 or 16 bits")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # Pillow would clip it at 255
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")


def to_array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image's pixels, uint8 of shape (height, width, 3)."""
    return np.array(image, dtype=np.uint8)


def to_image(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Image.Image:
    """Return the image of pixels, uint8 of shape (height, width, 3)."""
    return Image.fromarray(pixels)


def encode(frames: Frames, fps: int, format: str, scale: int = 1) -> bytes:
    """Return frames as an mp4 (H.264, yuv420p) or gif file, enlarged by a whole number."""
    pixels = quantise(frames).repeat(scale, axis=1).repeat(scale, axis=2)
    if format == "gif":
        ends = [round(100 * (index + 1) / fps) for index in range(len(pixels))]  # a gif counts in 10 ms
        lasts = [10 * (end - start) for start, end in pairwise([0, *ends])]
        duration = lasts if len(lasts) > 1 else lasts[0]  # Pillow takes no list of one
        return bytes(iio.imwrite("<bytes>", pixels, extension=".gif", duration=duration, loop=0))
    with tempfile.TemporaryDirectory(prefix="disagg_ray_") as folder:
        path = Path(folder) / "video.mp4"
        iio.imwrite(
            path, pixels, plugin="FFMPEG", fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=1,
            quality=None, output_params=list(H264), ffmpeg_log_level="error",
        )  # fmt: skip
        return path.read_bytes()


def load_video(path: str | Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the frames of a video file, uint8 of shape (num_frames, height, width, 3)."""
    return np.asarray(iio.imread(path, plugin="FFMPEG"), dtype=np.uint8)


def encode_png(frame: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    """Return one frame as a png file."""
    buffer = io.BytesIO()
    Image.fromarray(quantise(frame)).save(buffer, format="PNG")
    return buffer.getvalue()


def quantise(frames: Frames) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Round frames in [0, 1] to 8 bits, as diffusers' `numpy_to_pil` does."""
    return np.asarray((frames * 255).round().clip(0, 255), dtype=np.uint8)
