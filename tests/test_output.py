"""Results are written whole, where the user said, or not at all."""

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from disagg_ray import OutputError, Request, Result, load_config
from disagg_ray.media.output import write, write_text
from disagg_ray.media.places import check_file, check_folder, check_output, check_trace, format_of, local_path
from disagg_ray.media.sound import Sound, read_wav
from disagg_ray.media.video import Frames, quantise
from disagg_ray.request import resolve

CONFIG = load_config(Path(__file__).parent.parent / "conf" / "tiny_t2v.yaml")
FRAMES: Frames = np.random.default_rng(0).random((3, 16, 32, 3), np.float32)
SOUND = Sound(np.zeros((2, 12_000), np.float32), 24_000)
"""Half a second, which takes 96 kB."""
NAMES = {"mp4": "out.mp4", "gif": "out.gif", "npy": "out.npy", "frames": "out"}


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    """Start every test with nothing under memory://."""
    fsspec.filesystem("memory").store.clear()
    yield
    fsspec.filesystem("memory").store.clear()


def result(format: str = "mp4") -> Result:
    request, _ = resolve(Request(prompt="a cat", format=format), CONFIG)
    encoded = format in ("mp4", "gif")
    return Result(request, 1.0, (), b"encoded" if encoded else None, None if encoded else FRAMES)


def refusal(output: Any, *, overwrite: bool = False, in_job: bool = False) -> str:
    """Return the message with which an output is refused before any work."""
    with pytest.raises(OutputError) as caught:
        check_output(output, overwrite=overwrite, in_job=in_job)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("output", "format"),
    [
        ("a.mp4", "mp4"), ("a.MP4", "mp4"), ("a.gif", "gif"), ("a.Gif", "gif"), ("a.npy", "npy"), ("a", "frames"),
        ("a.png", "png"), ("a.JPEG", "jpg"), ("a.webp", "webp"),
        ("a.b/c", "frames"), ("a/", "frames"), ("s3://bucket/a.mp4", "mp4"), ("file:///tmp/a.NPY", "npy"),
    ],
)  # fmt: skip
def test_the_suffix_decides_the_format(output: str, format: str) -> None:
    assert format_of(output) == format_of(Path(output)) == format


@pytest.mark.parametrize("output", ["a.avi", "a.mp4.txt", "s3://bucket/a.webm", "a.bmp"])
def test_an_unknown_suffix_is_refused_by_name(output: str) -> None:
    message = refusal(output)
    assert repr(Path(output).suffix) in message
    assert ".mp4, .gif, .npy" in message


@pytest.mark.parametrize("format", ["mp4", "gif"])
def test_an_encoded_file_is_written_as_it_is(format: str, tmp_path: Path) -> None:
    path = result(format).save(tmp_path / NAMES[format])
    assert path == tmp_path / NAMES[format]
    assert Path(path).read_bytes() == b"encoded"


def test_npy_keeps_every_bit(tmp_path: Path) -> None:
    result("npy").save(tmp_path / "out.npy")
    loaded = np.load(tmp_path / "out.npy", allow_pickle=False)
    assert loaded.dtype == np.float32
    np.save(tmp_path / "numpy.npy", FRAMES)
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert (loaded == FRAMES).all()


@pytest.mark.parametrize("name", ["out.npy", "out.NPY", "out.npy/"])
def test_sound_lies_beside_raw_frames(name: str, tmp_path: Path) -> None:
    made = replace(result("npy"), sound=SOUND)
    written = Path(made.save(f"{tmp_path}/{name}"))
    assert {path.name for path in tmp_path.iterdir()} == {written.name, "out.wav"}
    assert np.array_equal(read_wav((tmp_path / "out.wav").read_bytes()).samples, SOUND.samples)
    written.unlink()
    with pytest.raises(OutputError, match=r"out\.wav' exists"):
        made.save(f"{tmp_path}/{name}", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.wav"]


def test_png_is_a_folder_of_numbered_frames(tmp_path: Path) -> None:
    result("frames").save(tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["frame_00000.png", "frame_00001.png", "frame_00002.png"]
    with Image.open(tmp_path / "out" / names[2]) as image:
        assert (np.asarray(image) == quantise(FRAMES[2])).all()


@pytest.mark.parametrize("format", NAMES)
def test_folders_above_are_created(format: str, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / NAMES[format]
    check_output(path, overwrite=False)
    assert not (tmp_path / "a").exists()
    result(format).save(path)
    assert path.exists()


@pytest.mark.parametrize("made", NAMES)
@pytest.mark.parametrize("wanted", NAMES)
def test_a_suffix_of_another_format_is_refused_by_both_names(made: str, wanted: str, tmp_path: Path) -> None:
    if made == wanted:
        assert result(made).save(tmp_path / NAMES[wanted])
        return
    with pytest.raises(OutputError, match=f"asks for {wanted}, but the request's format is {made}"):
        result(made).save(tmp_path / NAMES[wanted])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", NAMES)
def test_an_existing_output_is_kept_without_overwrite(format: str, tmp_path: Path) -> None:
    path = tmp_path / NAMES[format]
    result(format).save(path)
    assert "exists; give --overwrite" in refusal(path)
    with pytest.raises(OutputError, match="exists"):
        result(format).save(path, overwrite=False)
    check_output(path, overwrite=True)


def test_an_existing_file_is_replaced_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"something old and longer")
    (tmp_path / "reader").hardlink_to(tmp_path / "out.mp4")
    result().save(tmp_path / "out.mp4", overwrite=True)
    assert (tmp_path / "out.mp4").read_bytes() == b"encoded"
    assert (tmp_path / "reader").read_bytes() == b"something old and longer", "whoever reads the old one is disturbed"
    assert {path.name for path in tmp_path.iterdir()} == {"out.mp4", "reader"}


def test_an_existing_folder_of_frames_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "frame_00009.png").touch()
    result("frames").save(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "frame_00009.png").exists()
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("foreign", ["notes.txt", "frame_1.jpg", "frame_00001.png.bak", "frames"])
def test_a_folder_with_other_files_is_never_replaced(foreign: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / foreign).touch()
    assert "other files than frames" in refusal(tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="other files"):
        result("frames").save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / foreign).exists()


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").mkdir()
    (tmp_path / "out").touch()
    assert "is a folder" in refusal(tmp_path / "out.mp4", overwrite=True)
    assert "is no folder" in refusal(tmp_path / "out", overwrite=True)


def test_a_file_cannot_hold_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(tmp_path / "file" / "deeper" / "out.mp4")
    assert "out.mp4" in message
    assert "is not a folder that can be written" in message


def test_a_folder_that_takes_no_file_is_refused() -> None:
    assert "output: '/proc/nope/out.mp4' cannot be written" in refusal("/proc/nope/out.mp4")
    with pytest.raises(OutputError, match=r"trace: '/proc/trace.json' cannot be written"):
        check_trace("/proc/trace.json")


def test_a_full_disk_is_refused(small_disk: Path) -> None:
    check_output(small_disk / "new" / "out.mp4", overwrite=False)
    assert list(small_disk.iterdir()) == []
    (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert "No space left" in refusal(small_disk / "new" / "out.mp4")
    assert [path.name for path in small_disk.iterdir()] == ["full"]


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_a_link_is_neither_replaced_nor_followed(format: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / NAMES[format]
    link.symlink_to(target)
    for overwrite in (False, True):
        assert f"is a link to '{target}'" in refusal(link, overwrite=overwrite)
        with pytest.raises(OutputError, match="is a link"):
            result(format).save(link, overwrite=overwrite)
    assert (link.is_symlink(), list((tmp_path / "there").iterdir())) == (True, [])


def test_a_folder_above_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    result().save(tmp_path / "link" / "out.mp4")
    assert (tmp_path / "there" / "out.mp4").read_bytes() == b"encoded"


def test_a_report_that_passes_its_check_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.yaml"
    check_file(path, "output")
    write_text(path, "words")
    assert path.read_text() == "words"
    (tmp_path / "file").touch()
    for wrong, words in (
        (Path("-"), "standard output"),
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "a", "cannot"),
    ):
        with pytest.raises(OutputError, match=words):
            check_file(wrong, "output")


def test_standard_output_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "'-' would be standard output" in refusal("-", overwrite=True)
    with pytest.raises(OutputError, match="output-dir: '-' would be standard output"):
        check_folder("-")
    with pytest.raises(OutputError, match="'-' would be standard output"):
        result("frames").save("-")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_a_folder_is_refused_by_the_flag_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for field in ("output-dir", "output"):
        with pytest.raises(OutputError, match=rf"^{field}: '.*/file' is no folder; give the name of one"):
            check_folder(tmp_path / "file", field)


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.mp4")
    assert "is no regular file" in refusal(tmp_path / "out.mp4", overwrite=True)


@pytest.mark.parametrize("format", NAMES)
def test_a_rescued_result_is_whole_and_private(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = result(format).rescue()
    assert path.parent.parent == tmp_path
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.is_dir() if format == "frames" else path.stat().st_size > 6


def test_a_full_temporary_folder_is_passed_over(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    monkeypatch.setenv("HOME", str(tmp_path))
    (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    assert tmp_path in result("npy").rescue().parents
    assert [path.name for path in small_disk.iterdir()] == ["full"]


def test_frames_are_rescued_where_their_sound_has_room_too(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    monkeypatch.setenv("HOME", str(tmp_path))
    path = replace(result("npy"), sound=SOUND).rescue()
    assert path.parent.parent == tmp_path
    assert {path.name for path in path.parent.iterdir()} == {"video.npy", "video.wav"}
    assert list(small_disk.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert "is not a folder that can be written" in refusal(tmp_path / "out.mp4")


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert repr(str(tmp_path)) in refusal(tmp_path / "new" / "out.mp4")


@pytest.mark.parametrize("output", ["", ".", "x" * 300 + ".mp4", "a\0.mp4", "a\0/b"])
def test_what_cannot_be_a_file_is_refused(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(output, overwrite=True).startswith(f"output: {output!r}")


def test_a_relative_path_in_a_ray_job_is_refused_with_what_to_write(tmp_path: Path) -> None:
    message = refusal("videos/out.mp4", in_job=True)
    assert "absolute path" in message
    assert "s3://" in message
    assert "relative" in refusal("file://out.mp4", in_job=True)
    check_output(tmp_path / "out.mp4", overwrite=False, in_job=True)
    check_output("~/out.mp4", overwrite=True, in_job=True)
    check_output("memory://out.mp4", overwrite=False, in_job=True)


def test_a_relative_path_lands_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result().save("out.mp4")
    assert (tmp_path / "out.mp4").exists()


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert result().save("~/out.mp4") == tmp_path / "out.mp4"
    assert (tmp_path / "out.mp4").exists()


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/new/out.mp4"
    assert result().save(url) == tmp_path / "new" / "out.mp4"
    assert "exists" in refusal(url)


@pytest.mark.parametrize("format", ["mp4", "gif", "npy"])
def test_a_url_is_written_and_kept_without_overwrite(format: str) -> None:
    url = f"memory://folder/{NAMES[format]}"
    assert result(format).save(url) == url
    with fsspec.open(url) as source:
        assert source.read(6) == (b"\x93NUMPY" if format == "npy" else b"encode")
    assert "exists" in refusal(url)
    check_output(url, overwrite=True)


def test_a_url_is_tried_and_left_as_it_was() -> None:
    check_output("memory://folder/out.mp4", overwrite=False)
    assert fsspec.filesystem("memory").store == {}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://folder/frames", "local path"),
        ("https://example.org/out.mp4", "cannot be written"),
        ("nosuch://folder/out.mp4", "cannot be reached"),
        ("local:///proc/nope/out.mp4", "cannot be written, as a small object beside it shows"),
    ],
)
def test_a_url_that_cannot_take_the_result_is_refused(url: str, words: str) -> None:
    message = refusal(url)
    assert repr(url) in message
    assert words in message


def disk_is_full(*_: object) -> bytes:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("format", ["mp4", "npy"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / NAMES[format]
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OutputError, match="No space left"):
        result(format).save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_folder_leaves_the_old_one_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result("frames").save(tmp_path / "out")
    before = (tmp_path / "out" / "frame_00000.png").read_bytes()
    written = iter([b"whole"])
    monkeypatch.setattr("disagg_ray.media.output.encode_png", lambda frame: next(written, None) or disk_is_full())
    with pytest.raises(OutputError, match="No space left"):
        result("frames").save(tmp_path / "out")
    assert (tmp_path / "out" / "frame_00000.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(b"encoded", "mp4", tmp_path / "out.mp4", overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_is_respected(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        result().save(tmp_path / "out.mp4")
        result("frames").save(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.mp4").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "out" / "frame_00000.png").stat().st_mode) == 0o666 & ~umask


@settings(max_examples=200, suppress_health_check=list(HealthCheck), database=None)
@given(
    name=st.text("ab./-:\0\n\udc80\u202e é*?[]%#&=", max_size=20),
    suffix=st.sampled_from(["", ".mp4", ".GIF", ".npy", ".txt"]),
)
def test_any_name_is_refused_in_one_line_or_written(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = (name + suffix).lstrip("/").replace("..", "").replace("://", ":")
    try:
        check_output(output, overwrite=True)
    except OutputError as error:
        assert "\n" not in str(error)
    else:
        assert local_path(result(format_of(output)).save(output)).exists()
