"""What the end of a request needs: an encoder that works, and places that take files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from disagg_ray.doctor.check import Check, fail, ok
from disagg_ray.errors import EncodeError, OutputError
from disagg_ray.media.output import check_output, try_folder
from disagg_ray.media.video import check_writer


def check_ffmpeg() -> Check:
    """Encode one small frame."""
    try:
        check_writer("mp4")
    except EncodeError as error:
        return fail("ffmpeg", str(error), "pip install --force-reinstall imageio-ffmpeg; or set IMAGEIO_FFMPEG_EXE")
    return ok("ffmpeg", "encodes mp4")


def check_temporary() -> Check:
    """Write a small file where Ray has its session, and where a video is rescued to."""
    remedy = "free some of its space, or set TMPDIR to another folder"
    try:
        folder = tempfile.gettempdir()
        try_folder(Path(folder), "temporary files")
    except (OSError, OutputError) as error:
        return fail("temporary", str(error), remedy)
    return ok("temporary", f"{folder} can be written")


def check_place(output: str) -> Check:
    """Write a small file where a video is to go."""
    try:
        check_output(output, overwrite=True)
    except OutputError as error:
        return fail("output", str(error), "give another --output")
    return ok("output", f"{output} can be written")
