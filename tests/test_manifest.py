"""The folder of a batch: one writer, a manifest that no crash breaks, and files that are known again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from disagg_ray import OutputError, Request, load_config
from disagg_ray.batch.manifest import MANIFEST, TORN, Folder, read_manifest, sha256_of, stat_of
from disagg_ray.batch.records import Record
from disagg_ray.media.places import TEMPORARY
from disagg_ray.request import resolve
from disagg_ray.result import StageTiming

CONFIG = load_config(Path(__file__).parent.parent / "conf" / "tiny_t2v.yaml")
STAGE = StageTiming("decoder", "decoder-0", 0.1, 0.2, 1e9, 0.3, 0.4, 100, "tcp", 0, 2)
DONE = Record(
    "猫", "done", "00ff", "setup", 1e9, "猫.mp4", 3, "abc", 10**18, resolve(Request(prompt="a cat"), CONFIG)[0], 1.5,
    (STAGE,),
)  # fmt: skip
FAILED = Record("dog", "failed", "00fe", "setup", 1e9, error="too\nlong")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    with Folder(tmp_path / "new" / "out") as opened:
        yield opened


def test_records_are_read_back_as_they_were_written(folder: Folder) -> None:
    folder.append(DONE)
    folder.append(FAILED)
    assert list(read_manifest(folder.path)) == [DONE, FAILED]
    assert list(read_manifest(folder.path, brief=True)) == [replace(DONE, request=None, stages=()), FAILED]
    assert (folder.path / MANIFEST).read_bytes().count(b"\n") == 2


def test_what_another_version_wrote_is_read(folder: Folder) -> None:
    values = asdict(DONE) | {"new": 1}
    del values["setup"], values["stages"][0]["attempts"]
    (folder.path / MANIFEST).write_text(json.dumps(values) + "\n")
    (record,) = read_manifest(folder.path)
    assert record == replace(DONE, setup=None, stages=(replace(STAGE, attempts=1),))


@pytest.mark.parametrize(
    "line", ["{", "[]", "null", "{}", '{"id": "a", "status": "done"}', '{"stages": 3}', '{"request": [1]}', "\0\0\0"]
)
def test_a_line_that_is_no_record_is_named_and_left_out(
    line: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.append(DONE)
    with (folder.path / MANIFEST).open("a") as sink:
        sink.write(line + "\n")
    folder.append(FAILED)
    assert list(read_manifest(folder.path)) == [DONE, FAILED]
    assert "manifest.jsonl:2: not a record" in caplog.text


@pytest.mark.parametrize("torn", ["{", '{"id": "x", "status": "done"}', "x" * 200_000])
@pytest.mark.parametrize("before", [0, 1])
def test_a_half_written_last_line_is_set_aside(
    torn: str, before: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Folder(tmp_path) as first:
        for _ in range(before):
            first.append(DONE)
    with (tmp_path / MANIFEST).open("a") as sink:
        sink.write(torn)
    with Folder(tmp_path) as second:
        second.append(FAILED)
        assert list(read_manifest(tmp_path)) == [DONE] * before + [FAILED]
    assert "half written" in caplog.text
    assert (tmp_path / TORN).read_text() == torn + "\n"


def test_a_second_run_is_refused_with_the_name_of_the_first(folder: Folder) -> None:
    with pytest.raises(OutputError, match=f"is being written by process {os.getpid()} on "):
        Folder(folder.path)
    folder.append(DONE)


def test_a_killed_run_leaves_no_lock_and_no_half_files(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from disagg_ray.batch.manifest import Folder; f = Folder(pathlib.Path(sys.argv[1]));"
        "(f.path / '.disagg_ray-x').touch(); (f.path / '.disagg_ray-y').mkdir(); (f.path / '.work' / 'a').touch();"
        "(f.path / '.work' / '.disagg_ray-z').touch(); print('ready', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    with pytest.raises(OutputError, match=f"process {child.pid} on "):
        Folder(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    with Folder(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".work", MANIFEST}
        assert [path.name for path in (tmp_path / ".work").iterdir()] == ["a"], "latents stay"


def test_the_work_folder_goes_when_it_is_empty(tmp_path: Path) -> None:
    with Folder(tmp_path) as folder:
        assert folder.latents_of("cat") == tmp_path / ".work" / "cat.safetensors"
        assert (tmp_path / ".work").is_dir()
    assert not (tmp_path / ".work").exists()


@pytest.mark.parametrize(
    ("format", "name"), [("mp4", "a.b.mp4"), ("gif", "a.b.gif"), ("npy", "a.b.npy"), ("frames", "a.b")]
)
def test_the_format_decides_the_suffix(format: str, name: str, folder: Folder) -> None:
    assert folder.video_of("a.b", format) == folder.path / name


@pytest.mark.parametrize("path", ["file", "file/out"])
def test_what_is_no_folder_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        Folder(tmp_path / path)


def test_a_folder_or_manifest_that_was_taken_away_is_noticed(folder: Folder) -> None:
    folder.check()
    (folder.path / MANIFEST).rename(folder.path / "old")
    with pytest.raises(FileNotFoundError):
        folder.check()
    (folder.path / "old").rename(folder.path / MANIFEST)
    folder.check()
    folder.path.rename(folder.path.with_name("moved"))
    folder.path.mkdir()
    with pytest.raises(FileNotFoundError, match="was replaced"):
        folder.check()


def test_a_manifest_that_cannot_grow_stays_as_it_was(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.append(DONE)
    whole = (folder.path / MANIFEST).read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    with pytest.raises(OSError, match="the disk is full"):
        folder.append(FAILED)
    assert (folder.path / MANIFEST).read_bytes() == whole


def test_a_file_is_known_by_size_and_time_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    assert stat_of(path) is None
    path.write_bytes(b"video")
    first, digest = stat_of(path), sha256_of(path)
    assert (stat_of(path), sha256_of(path)) == (first, digest)
    os.utime(path, ns=(1, 1))
    assert stat_of(path) != first
    path.write_bytes(b"vide0")
    assert sha256_of(path) != digest


def test_what_is_neither_a_file_nor_a_folder_is_no_video(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "endless.mp4").symlink_to("/dev/zero")
    assert stat_of(tmp_path / "pipe.mp4") is stat_of(tmp_path / "endless.mp4") is None


def test_a_folder_of_frames_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    (frames / "frame_00000.png").write_bytes(b"ab")
    (frames / "frame_00001.png").write_bytes(b"c")
    before, digest = stat_of(frames), sha256_of(frames)
    assert before is not None
    assert before.size == 3
    (frames / "frame_00000.png").write_bytes(b"a")
    (frames / "frame_00001.png").write_bytes(b"bc")
    assert sha256_of(frames) != digest
    (frames / "frame_00001.png").unlink()
    assert stat_of(frames) != before


def test_links_in_place_of_our_files_are_refused_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole line\nand half of one")
    for name, link in [(".lock", os.symlink), (MANIFEST, os.symlink), (".lock", os.link), (MANIFEST, os.link)]:
        out = tmp_path / f"out-{name}-{link.__name__}"
        out.mkdir()
        link(victim, out / name)
        with pytest.raises(OutputError, match=f"output-dir: .*{name} is (a symbolic link|no regular file of its own)"):
            Folder(out)
        if name == MANIFEST:
            with pytest.raises(OutputError, match="remove it"):
                list(read_manifest(out))
    assert victim.read_text() == "whole line\nand half of one"


def test_a_pipe_in_place_of_a_manifest_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(OutputError, match="no regular file of its own"):
        list(read_manifest(tmp_path))
    with pytest.raises(OutputError, match="no regular file of its own"):
        Folder(tmp_path)


def test_a_link_in_place_of_the_work_folder_is_refused_and_links_named_like_ours_are_only_unlinked(
    tmp_path: Path,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{TEMPORARY}x").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{TEMPORARY}y").symlink_to(tmp_path / "elsewhere")
    with Folder(tmp_path / "out"):
        assert not (tmp_path / "out" / f"{TEMPORARY}y").is_symlink()
    (tmp_path / "out" / ".work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"\.work is a symbolic link"):
        Folder(tmp_path / "out")
    assert (tmp_path / "elsewhere" / f"{TEMPORARY}x").exists()
