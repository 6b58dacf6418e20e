"""A video file is whole or an error, whatever ffmpeg does."""

import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import psutil
import pytest

from disagg_ray import LocalPipeline, Request, load_config
from disagg_ray.errors import EncodeError
from disagg_ray.graph import build_graph
from disagg_ray.media.mp4 import H264
from disagg_ray.media.video import Frames, check_writer, encode, quantise
from disagg_ray.progress.events import Event
from disagg_ray.replica.actor import Replica

REAL = imageio_ffmpeg.get_ffmpeg_exe()
NOISE: Frames = np.random.default_rng(0).random((9, 64, 96, 3), np.float32)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let nothing that starts here write more than that into a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of what is run instead of ffmpeg."""
    program = tmp_path / "ffmpeg"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    return program


def failure(timeout_s: float = 60.0) -> str:
    before = set(psutil.Process().children())  # of other tests
    with pytest.raises(EncodeError) as caught:
        encode(NOISE, 8, "mp4", timeout_s=timeout_s)
    assert "\n" not in str(caught.value)
    left = set(psutil.Process().children()) - before
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
    return str(caught.value)


def by_imageio(frames: Frames, fps: int, format: str, path: Path) -> bytes:
    """Return the file as imageio writes it."""
    pixels = quantise(frames)
    if format == "mp4":
        iio.imwrite(
            path / "a.mp4", pixels, plugin="FFMPEG", fps=fps, codec="libx264", pixelformat="yuv420p",
            macro_block_size=1, quality=None, output_params=list(H264), ffmpeg_log_level="error",
        )  # fmt: skip
        return (path / "a.mp4").read_bytes()
    ends = [round(100 * (index + 1) / fps) for index in range(len(pixels))]
    duration = [10 * (end - start) for start, end in pairwise([0, *ends])]
    return bytes(iio.imwrite("<bytes>", pixels, extension=".gif", duration=duration, loop=0))


@pytest.mark.parametrize("format", ["mp4", "gif"])
@pytest.mark.parametrize("num_frames", [2, 9])
def test_a_file_is_what_imageio_writes_bit_for_bit(format: str, num_frames: int, tmp_path: Path) -> None:
    assert encode(NOISE[:num_frames], 7, format) == by_imageio(NOISE[:num_frames], 7, format, tmp_path)


def test_a_file_that_is_cut_short_is_an_error() -> None:
    assert len(encode(NOISE, 8, "mp4")) > 40_000
    with largest_file(40_000):
        assert "ffmpeg failed" in failure()


def test_a_full_temporary_folder_costs_no_video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    assert len(encode(NOISE, 8, "mp4")) > 40_000


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("cat > /dev/null; exit 3", "exit status 3"),
        ("echo no such encoder >&2; exit 1", "no such encoder"),
        ("cat > /dev/null; kill -9 $$", "SIGKILL"),
        ("cat > /dev/null", "0 bytes that are no whole mp4"),
        ("cat > /dev/null; for last; do :; done; head -c 100 /dev/zero > $last", "100 bytes that are no whole mp4"),
    ],
)
def test_what_ffmpeg_does_instead_is_named(script: str, words: str, ffmpeg: Path) -> None:
    ffmpeg.write_text(f"#!/bin/sh\n{script}\n")
    ffmpeg.chmod(0o700)
    assert words in failure()


def test_a_frame_too_few_is_an_error(ffmpeg: Path) -> None:
    ffmpeg.write_text(f"#!/bin/sh\nhead -c {8 * 64 * 96 * 3} | {REAL} $*\ncat > /dev/null\n")
    ffmpeg.chmod(0o700)
    assert "8 frames of 96x64, instead of 9 frames of 96x64" in failure()


@pytest.mark.parametrize("script", ["exec sleep 1000", "cat > /dev/null; exec sleep 1000"])
def test_an_ffmpeg_that_hangs_is_ended(script: str, ffmpeg: Path) -> None:
    ffmpeg.write_text(f"#!/bin/sh\n{script}\n")
    ffmpeg.chmod(0o700)
    assert "ffmpeg hangs: nothing for 0.2 s" in failure(timeout_s=0.2)


def test_no_ffmpeg_is_found_before_any_work(ffmpeg: Path) -> None:
    check_writer.cache_clear()
    with pytest.raises(EncodeError, match=f"No such file or directory: '{ffmpeg}'"):
        check_writer("mp4")
    check_writer("gif")
    check_writer("npy")


@pytest.mark.parametrize(("format", "height", "width"), [("mp4", 16, 16_400), ("mp4", 15, 16), ("gif", 65_536, 1)])
def test_a_size_that_a_format_cannot_hold_is_refused(format: str, height: int, width: int) -> None:
    with pytest.raises(EncodeError, match=f"holds no frames of {width}x{height}"):
        encode(np.zeros((1, height, width, 3), np.float32), 8, format)


@pytest.mark.parametrize(("height", "width"), [(16_384, 16), (16, 16_384)])
def test_the_largest_sides_are_held(height: int, width: int) -> None:
    data = encode(np.zeros((1, height, width, 3), np.float32), 8, "mp4")
    assert iio.imread(data, plugin="FFMPEG", extension=".mp4").shape == (1, height, width, 3)


def test_each_frame_is_reported_and_none_is_copied_before_its_turn() -> None:
    frames, told = np.tile(NOISE, (10, 1, 1, 1)), []
    tracemalloc.start()
    try:
        encode(frames, 8, "mp4", on_frame=lambda: told.append(1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(told), peak < frames.nbytes / 4) == (len(frames), True)


@pytest.mark.proof
def test_a_request_survives_a_file_that_failed_once(tmp_path: Path, ffmpeg: Path) -> None:
    ffmpeg.write_text(
        f"#!/bin/sh\necho . >> {tmp_path}/calls\n[ $(wc -l < {tmp_path}/calls) != 2 ] && exec {REAL} $*\n"
    )
    ffmpeg.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-m", "disagg_ray.cli", "generate", "--config", "conf/tiny_t2v.yaml", "--prompt", "a circle",
         "--num-frames", "5", "--num-inference-steps", "1", "--output", tmp_path / "a.mp4", "fused=true"],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ffmpeg failed after frame 0: exit status 1" in done.stderr
    assert len(iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")) == 5


def test_a_replica_without_ffmpeg_does_not_start(ffmpeg: Path) -> None:
    config = load_config("conf/tiny_t2v.yaml", "fused=true")
    check_writer.cache_clear()
    replica = Replica("fused", 0, config)
    with pytest.raises(EncodeError, match=f"No such file or directory: '{ffmpeg}'"):
        replica.load(build_graph([replica.describe().ports]), host="127.0.0.1")


def test_a_local_pipeline_without_ffmpeg_computes_nothing(ffmpeg: Path) -> None:
    events: list[Event] = []
    check_writer.cache_clear()
    with LocalPipeline(load_config("conf/tiny_t2v.yaml"), events.append) as pipeline, pytest.raises(EncodeError):
        pipeline.generate(Request(prompt="a cat", num_frames=5, num_inference_steps=1))
    assert events == []
