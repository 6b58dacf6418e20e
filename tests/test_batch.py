"""Batches on a real local Ray: what is done stays, what is missing is made, what ends a run early costs nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from disagg_ray import OutputError, Pipeline, Request, Result, load_config
from disagg_ray.batch.manifest import MANIFEST, Folder, read_manifest, save, sha256_of
from disagg_ray.batch.records import Record
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.batch.resume import Options
from disagg_ray.batch.run import generate
from disagg_ray.batch.summary import Summary
from disagg_ray.media.sound import Sound
from disagg_ray.request import resolve
from disagg_ray.result import rescued

pytestmark = pytest.mark.slow

I2V = "conf/tiny_i2v.yaml"
CONFIG = load_config(I2V)
SMALL = {"num_frames": 5, "num_inference_steps": 2, "image": "first.png"}
Start = Callable[[int], AbstractContextManager[Pipeline]]


@pytest.fixture(scope="module")
def pipeline(cluster: None) -> Iterator[Pipeline]:
    with Pipeline(CONFIG) as started:
        yield started


@pytest.fixture
def start(pipeline: Pipeline) -> Start:
    return lambda _: nullcontext(pipeline)


@contextmanager
def start_fused(_: int) -> Iterator[Pipeline]:
    """Start one for a test that ends it."""
    with Pipeline.from_config(I2V, "fused=true") as started:
        yield started


def not_started(_: int) -> AbstractContextManager[Pipeline]:
    raise AssertionError("there is nothing to make")


@pytest.fixture
def folder(tmp_path: Path, image: Callable[..., Image.Image]) -> Path:
    """Give a folder with a first frame in it."""
    image(64, 64).save(tmp_path / "first.png")
    return tmp_path


def write_requests(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(SMALL | {"prompt": "a red circle moving left"} | line) + "\n" for line in lines))
    return path


def run(path: Path, start: Start, out: Path | None = None, **options: bool) -> Summary:
    return generate(Options(path, out or path.parent / "out", **options), CONFIG, start)


def records(out: Path) -> dict[str, Record]:
    found = list(read_manifest(out))
    assert len({record.id for record in found}) == len(found), "a request is twice in the manifest"
    return {record.id: record for record in found}


def files(out: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in out.iterdir()}


def test_each_request_has_a_file_and_a_line_in_the_manifest(
    folder: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_requests(
        folder, {"id": "a"}, {"id": "b", "format": "frames"}, {"id": "c", "format": "npy", "seed": 7}, {}
    )
    summary = run(path, start)
    assert (summary.done, summary.complete) == (4, True)
    found = records(folder / "out")
    for record in found.values():
        assert record.file is not None
        assert record.request is not None
        assert record.sha256 == sha256_of(folder / "out" / record.file)
        assert [stage.stage for stage in record.stages] == ["encoder", "transformer", "decoder"]
        assert all(stage.attempts == 1 and stage.compute_s > 0 for stage in record.stages)
        assert (record.request.id, record.request.num_inference_steps) == (record.id, 2)
        assert record.pictures["image"].sha256 == record.request.images["image"].sha256
    assert iio.imread(folder / "out" / "a.mp4", plugin="FFMPEG").shape == (5, 256, 256, 3)
    assert len(list((folder / "out" / "b").iterdir())) == 5
    assert found["c"].request is not None
    assert found["c"].request.seed == 7
    assert {path.name for path in (folder / "out").iterdir()} >= {"a.mp4", "b", "c.npy", MANIFEST}
    assert not (folder / "out" / ".work").exists()
    out = capsys.readouterr().out
    assert "4 done, 0 done before, 0 failed" in out
    assert "bottleneck: " in out


def test_a_second_run_touches_nothing_and_starts_nothing(folder: Path, start: Start) -> None:
    path = write_requests(folder, {"id": "a"}, {"id": "b"})
    run(path, start)
    before = files(folder / "out")
    summary = run(path, not_started, verify=True)
    assert (summary.done, summary.already_done, summary.complete) == (0, 2, True)
    assert {name: before[name] for name in ("a.mp4", "b.mp4", MANIFEST)}.items() <= files(folder / "out").items()


def test_what_vanished_is_made_again_to_the_same_bytes(folder: Path, start: Start) -> None:
    path = write_requests(folder, {"id": "a"}, {"id": "b"})
    run(path, start)
    video, other = (folder / "out" / "a.mp4").read_bytes(), files(folder / "out")["b.mp4"]
    (folder / "out" / "a.mp4").unlink()
    summary = run(path, start)
    assert (summary.done, summary.already_done) == (1, 1)
    assert (folder / "out" / "a.mp4").read_bytes() == video, "the seed that was drawn is another one"
    assert files(folder / "out")["b.mp4"] == other


def test_a_failing_request_is_recorded_and_the_others_are_made(
    folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pipeline", "batch.requests_file"):  # as where the tokenizer is elsewhere
        monkeypatch.setattr(f"disagg_ray.{module}.check_prompts", lambda *_: None)
    (folder / "broken.png").write_bytes(b"no image")
    long = "a red circle " * 100
    path = write_requests(
        folder, {"id": "a"}, {"id": "long", "prompt": long}, {"id": "b", "image": "broken.png"}, {"id": "c"}
    )
    summary = run(path, start)
    assert (summary.done, summary.failed, summary.missing, summary.complete) == (2, 2, 0, False)
    found = records(folder / "out")
    assert {name: record.status for name, record in found.items()} == {
        "a": "done", "c": "done", "long": "failed", "b": "failed"
    }  # fmt: skip
    assert "tokens are over the model's 32" in str(found["long"].error)
    assert "cannot be read as an image" in str(found["b"].error)
    again = run(path, not_started)
    assert (again.already_done, again.failed, again.complete) == (2, 2, False)
    shutil.copy(folder / "first.png", folder / "broken.png")
    retried = run(path, start, retry_failed=True)
    assert (retried.done, retried.already_done, retried.failed) == (1, 2, 1)


def test_invalid_lines_are_skipped_only_on_request(folder: Path, start: Start) -> None:
    path = write_requests(folder, {"id": "a"}, {"id": "../b"})
    summary = run(path, start, skip_invalid=True)
    assert (summary.done, summary.invalid, summary.complete) == (1, 1, False)


def test_latents_of_a_killed_run_are_decoded(folder: Path, start: Start, pipeline: Pipeline) -> None:
    path = write_requests(folder, {"id": "a"})
    run(path, start, folder / "undisturbed")
    with RequestsFile(path, CONFIG) as source, Folder(folder / "out") as out:
        source.scan(lambda number, fault: None)
        pipeline.submit(source.line(0).request, latents_file=out.latents_of("a")).result(180)
        assert out.latents_of("a").exists()
    run(path, start)
    assert [stage.stage for stage in records(folder / "out")["a"].stages] == ["decoder"]
    assert (folder / "out" / "a.mp4").read_bytes() == (folder / "undisturbed" / "a.mp4").read_bytes()
    assert not (folder / "out" / ".work").exists()


@pytest.fixture
def rescue_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where videos are saved that their folder does not take."""
    place = tmp_path / "rescued"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def make_result() -> Result:
    request, _ = resolve(Request(prompt="a cat", id="a"), load_config("conf/tiny_t2v.yaml"))
    return Result(request, 1.0, (), bytes(1000), None)


def make_raw_result() -> Result:
    frames, sound = np.zeros((1, 16, 16, 3), np.float32), Sound(np.zeros((2, 10), np.float32), 24_000)
    made = make_result()
    return replace(made, request=replace(made.request, format="npy"), data=None, frames=frames, sound=sound)


def test_a_video_is_saved_elsewhere_unless_its_latents_are_kept(small_disk: Path, rescue_place: Path) -> None:
    with Folder(small_disk) as folder:
        folder.latents_of("a").touch()
        (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free))
        with pytest.raises(OutputError, match="No space left"):
            save(make_result(), folder.video_of("a", "mp4"), folder)
        assert list(rescue_place.iterdir()) == []
        folder.latents_of("a").unlink()
        with pytest.raises(OutputError, match=r"No space left.*video.mp4' on .* instead"):
            save(make_result(), folder.video_of("a", "mp4"), folder)
    assert [len(path.read_bytes()) for path in rescue_place.glob("*/video.mp4")] == [1000]


def test_a_link_in_the_way_of_a_batch_s_video_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    with Folder(tmp_path / "out") as folder:
        path = folder.video_of("a", "mp4")
        path.symlink_to(tmp_path / "mine")
        save(make_result(), path, folder)
    assert (path.is_symlink(), path.stat().st_size, (tmp_path / "mine").read_bytes()) == (False, 1000, b"mine")


def test_a_link_in_the_way_of_a_batch_s_sound_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    made = make_raw_result()
    with Folder(tmp_path / "out") as folder:
        path = folder.video_of("a", "npy")
        path.with_suffix(".wav").symlink_to(tmp_path / "mine")
        save(made, path, folder)
    assert made.sound is not None
    assert path.with_suffix(".wav").read_bytes() == made.sound.to_wav()
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_raw_frames_that_their_place_does_not_take_are_elsewhere_with_their_sound(rescue_place: Path) -> None:
    said = rescued(make_raw_result())
    (frames,), (sound,) = rescue_place.glob("*/video.npy"), rescue_place.glob("*/video.wav")
    assert f"{str(frames)!r}, and its sound {str(sound)!r}, on " in said


@pytest.mark.usefixtures("rescue_place")
def test_a_full_disk_ends_the_run_and_the_next_one_resumes(folder: Path, small_disk: Path, start: Start) -> None:
    path = write_requests(folder, *({"id": f"clip-{n}"} for n in range(16)))
    summary = run(path, start_fused, small_disk)
    assert "No space left" in str(summary.stopped)
    assert 0 < summary.done < 16
    done = {record.id: files(small_disk)[str(record.file)] for record in read_manifest(small_disk)}
    assert len(done) == summary.done
    assert all(record.status == "done" for record in read_manifest(small_disk)), "a full disk is no request's fault"
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    second = run(path, start, small_disk)
    assert (second.done, second.already_done, second.complete) == (16 - len(done), len(done), True)
    assert {name: files(small_disk)[f"{name}.mp4"] for name in done} == done
    assert len(records(small_disk)) == 16


@pytest.mark.usefixtures("rescue_place")
@pytest.mark.parametrize("event", ["folder moved", "file changed"])
def test_a_moved_folder_or_a_changed_file_ends_the_run(event: str, folder: Path, start: Start) -> None:
    path, out = write_requests(folder, *({"id": f"clip-{n}"} for n in range(200))), folder / "out"

    def disturb() -> None:
        helpers.wait_until((out / "clip-0.mp4").exists, "nothing was made", 180)
        if event == "folder moved":
            out.rename(folder / "moved")
        else:
            with path.open("a") as requests:
                requests.write("\n")

    thread = threading.Thread(target=disturb)
    thread.start()
    summary = run(path, start_fused)
    thread.join()
    kept = folder / "moved" if event == "folder moved" else out
    assert ("No such file" if event == "folder moved" else "was changed while it was read") in str(summary.stopped)
    assert 0 < summary.done < 200
    assert summary.missing == 200 - summary.done
    assert len(records(kept)) == summary.done


@pytest.mark.proof
def test_a_writer_that_hangs_ends_the_run_and_keeps_the_folder_locked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a file system whose server is gone."""
    for name, value in {"LOOK_S": 0.2, "MAX_LOOKS": 10, "SETTLE_S": 0.1, "LAST_S": 0.1}.items():
        monkeypatch.setattr(f"disagg_ray.batch.run.{name}", value)
    back, append = threading.Event(), Folder.append

    def hang(self: Folder, record: Record) -> None:
        if record.id == "hung":
            back.wait(60)
        append(self, record)

    monkeypatch.setattr(Folder, "append", hang)
    path = write_requests(folder, {"id": "b"}, {"id": "hung"})  # one after the other
    summary = run(path, start_fused)
    assert "hangs: hung not written within 2 s; check its disk" in str(summary.stopped)
    assert (summary.done, summary.missing, list(records(folder / "out"))) == (1, 1, ["b"])
    assert "not written: hung; check the disk" in caplog.text
    with pytest.raises(OutputError, match="is being written by"):
        Folder(folder / "out")
    back.set()
    helpers.wait_until(lambda: set(records(folder / "out")) == {"b", "hung"}, "the disk is back", 60)


@contextmanager
def running(path: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command as a user does."""
    arguments = ["generate", "--config", I2V, "--requests", str(path), "--output-dir", str(path.parent / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "disagg_ray.cli", *arguments, *overrides]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.proof
def test_sigterm_ends_a_run_and_the_next_one_resumes(folder: Path, start: Start) -> None:
    path, out = write_requests(folder, *({"id": f"clip-{n}"} for n in range(40))), folder / "out"
    with running(path) as child:
        assert child.stderr is not None
        assert child.stdout is not None
        assert next((line for line in child.stderr if " of 40 videos done" in line), None), "it ended before"
        child.send_signal(signal.SIGTERM)
        log = child.stderr.read()
        assert child.wait(180) == 143, log
        assert "missing" in child.stdout.read()
    made = len(records(out))
    assert 1 <= made < 40
    assert {path.stem for path in out.glob("*.mp4")} == set(records(out))
    summary = run(path, start)
    assert (summary.done, summary.already_done, summary.complete) == (40 - made, made, True)


@pytest.mark.proof
def test_a_second_signal_ends_the_grace(folder: Path) -> None:
    long = {"id": "long", "height": 256, "width": 256, "num_frames": 33, "num_inference_steps": 100}
    with running(write_requests(folder, long), "failures.shutdown_grace_s=10000") as child:
        assert child.stderr is not None
        for sent, moment in ((signal.SIGTERM, "transformer-0 step"), (signal.SIGINT, "running requests get 10000 s")):
            assert next((line for line in child.stderr if moment in line), None), f"no {moment}"
            child.send_signal(sent)
        log = child.stderr.read()
        assert child.wait(180) == 130, log
    assert records(folder / "out") == {}
