"""Frames become files that decode again to the right count, size, rate and picture."""

import io
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image, ImageSequence

from disagg_ray.media.video import Frames, encode, encode_png, quantise, to_array, to_image


def clip(num_frames: int, height: int = 64, width: int = 96) -> Frames:
    """Return smooth colours that move."""
    y, x = np.mgrid[0:height, 0:width] / 96
    waves = [[np.sin(6 * x + t / 4), np.cos(5 * y + t / 5), np.sin(4 * (x + y) - t / 3)] for t in range(num_frames)]
    return np.asarray((np.array(waves) + 1) / 2, dtype=np.float32).transpose(0, 2, 3, 1)


def decode(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return iio.imread(data, plugin="FFMPEG", extension=".mp4")


def psnr(frames: Frames, decoded: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    return float(-10 * np.log10(np.mean((frames - decoded / 255.0) ** 2)))


def durations_ms(gif: bytes) -> list[int]:
    with Image.open(io.BytesIO(gif)) as image:
        return [frame.info["duration"] for frame in ImageSequence.Iterator(image)]


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "fps"), [(9, 64, 96, 16), (1, 64, 96, 8), (5, 16, 16, 7), (33, 48, 32, 240)]
)
def test_an_mp4_decodes_to_the_same_count_size_and_rate(num_frames: int, height: int, width: int, fps: int) -> None:
    data = encode(clip(num_frames, height, width), fps, "mp4")
    assert decode(data).shape == (num_frames, height, width, 3)
    assert iio.immeta(data, plugin="FFMPEG", extension=".mp4")["fps"] == fps


def test_an_mp4_is_what_browsers_play() -> None:
    data = encode(clip(5), 16, "mp4")
    about = iio.immeta(data, plugin="FFMPEG", extension=".mp4")
    assert about["codec"] == "h264"
    assert about["pix_fmt"].startswith("yuv420p")
    assert "bt709" in about["pix_fmt"]
    assert data.index(b"moov") < data.index(b"mdat")


def test_an_mp4_does_not_depend_on_the_muxer_s_version_or_the_number_of_cores() -> None:
    data = encode(clip(5), 16, "mp4")
    assert b"Lavf" not in data
    assert b" threads=1 " in data


def test_an_mp4_keeps_the_picture() -> None:
    frames = clip(9)
    assert psnr(frames, decode(encode(frames, 16, "mp4"))) > 35


@pytest.mark.parametrize("colour", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (1, 1, 1), (0.5, 0.25, 0.75)])
def test_an_mp4_keeps_flat_colours(colour: tuple[float, float, float]) -> None:
    frames = np.tile(np.array(colour, np.float32), (3, 32, 32, 1))
    assert np.abs(decode(encode(frames, 8, "mp4")) / 255.0 - frames).max() < 0.03


@pytest.mark.parametrize("format", ["mp4", "gif"])
def test_equal_frames_give_equal_bytes(format: str) -> None:
    frames = clip(5, 32, 48)
    data = encode(frames, 16, format)
    assert data == encode(frames.copy(), 16, format)
    assert data != encode(frames[::-1], 16, format)


def test_encoding_leaves_the_frames_alone() -> None:
    frames = clip(3)
    encode(frames, 8, "mp4")
    assert (frames == clip(3)).all()


@pytest.mark.parametrize(("num_frames", "fps"), [(9, 8), (9, 10), (13, 16), (25, 24), (17, 30), (5, 50), (3, 1)])
def test_a_gif_has_every_frame_and_lasts_as_long(num_frames: int, fps: int) -> None:
    lasts = durations_ms(encode(clip(num_frames, 32, 32), fps, "gif"))
    assert len(lasts) == num_frames
    assert abs(sum(lasts) - 1000 * num_frames / fps) <= 5
    assert min(lasts) >= 20


def test_a_gif_of_one_frame_is_a_gif() -> None:
    with Image.open(io.BytesIO(encode(clip(1), 8, "gif"))) as image:
        assert (image.format, image.size) == ("GIF", (96, 64))


def test_a_gif_loops_for_ever_and_keeps_the_picture() -> None:
    frames = clip(5)
    data = encode(frames, 10, "gif")
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["loop"] == 0
    assert psnr(frames, iio.imread(data, extension=".gif")) > 25


def test_a_gif_without_motion_lasts_as_long() -> None:
    assert sum(durations_ms(encode(np.repeat(clip(1), 8, axis=0), 8, "gif"))) == 1000


def test_a_png_keeps_every_value() -> None:
    frame = clip(1)[0]
    with Image.open(io.BytesIO(encode_png(frame))) as image:
        assert (np.asarray(image) == quantise(frame)).all()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, 0), (1.0, 255), (-0.1, 0), (1.2, 255), (0.4999 / 255, 0), (0.5001 / 255, 1), (0.5, 128), (127.4 / 255, 127)],
)
def test_frames_are_rounded_and_clipped(value: float, expected: int) -> None:
    pixels = quantise(np.full((2, 4, 4, 3), value, np.float32))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, 4, 4, 3)
    assert (pixels == expected).all()


def test_pixels_survive_the_way_to_an_image_and_back() -> None:
    pixels = quantise(clip(1, 16, 48)[0])
    assert to_image(pixels).size == (48, 16)
    assert (to_array(to_image(pixels)) == pixels).all()


def test_encoding_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    encode(clip(3), 8, "mp4")
    assert list(tmp_path.iterdir()) == []
