"""Images in, video out: the only place that imports imageio and Pillow."""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps

from disagg_ray.errors import RequestError

Frames = np.ndarray[Any, np.dtype[np.float32]]
"""Shape (num_frames, height, width, 3), in [0, 1]."""

MAX_IMAGE_BYTES = 256 * 2**20
"""A conditioning image file larger than this is refused unread."""

H264 = ("-crf", "17", "-threads", "1", "-bitexact", "-fflags", "+bitexact", "-flags:v", "+bitexact",
        "-movflags", "+faststart")  # fmt: skip
"""One encoder thread and bit-exact flags: equal frames give equal bytes."""


def load_image(source: Image.Image | str | Path, field: str, max_pixels: int) -> Image.Image:
    """Return an image upright (EXIF rotation applied) and RGB; its alpha, if any, is dropped.

    Raises:
        RequestError: missing, unreadable, truncated, or larger than `max_pixels` by its header, before it is decoded.
    """
    if isinstance(source, Image.Image):
        return _upright(source, field, max_pixels, "the image")
    path = Path(source).expanduser()
    if not path.is_file():
        raise RequestError(f"{field}: {str(source)!r} is not a file")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise RequestError(f"{field}: {str(source)!r} is over {MAX_IMAGE_BYTES} bytes; give a smaller one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the pixel check below is ours
            with Image.open(path) as image:
                return _upright(image, field, max_pixels, repr(str(source)))
    except Image.DecompressionBombError as error:
        raise RequestError(f"{field}: {str(source)!r} is over limits.max_image_pixels={max_pixels}") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{field}: {str(source)!r} cannot be read as an image: {error}") from error


def _upright(image: Image.Image, field: str, max_pixels: int, shown: str) -> Image.Image:
    if image.width * image.height > max_pixels:
        raise RequestError(
            f"{field}: {shown} has {image.width}x{image.height} pixels, over limits.max_image_pixels={max_pixels}"
        )
    return ImageOps.exif_transpose(image).convert("RGB")


def to_array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image's pixels, uint8 of shape (height, width, 3)."""
    return np.array(image, dtype=np.uint8)


def to_image(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Image.Image:
    """Return the image of pixels, uint8 of shape (height, width, 3)."""
    return Image.fromarray(pixels)


def encode(frames: Frames, fps: int, format: str) -> bytes:
    """Return frames as an mp4 (H.264, yuv420p) or gif file."""
    pixels = quantise(frames)
    if format == "gif":
        return bytes(iio.imwrite("<bytes>", pixels, extension=".gif", duration=1000 / fps, loop=0))
    with tempfile.TemporaryDirectory(prefix="disagg_ray_") as folder:
        path = Path(folder) / "video.mp4"
        iio.imwrite(
            path, pixels, plugin="FFMPEG", fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=1,
            quality=None, output_params=list(H264), ffmpeg_log_level="error",
        )  # fmt: skip
        return path.read_bytes()


def encode_png(frame: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    """Return one frame as a png file."""
    buffer = io.BytesIO()
    Image.fromarray(quantise(frame)).save(buffer, format="PNG")
    return buffer.getvalue()


def quantise(frames: Frames) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Round frames in [0, 1] to 8 bits, as diffusers' `numpy_to_pil` does."""
    return np.asarray((frames * 255).round().clip(0, 255), dtype=np.uint8)
