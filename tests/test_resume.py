"""What a second run makes, leaves alone and refuses."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from disagg_ray import OutputError, RequestError, load_config
from disagg_ray.batch.lines import MAX_SHOWN
from disagg_ray.batch.manifest import INVALID, MANIFEST, Folder, state_of
from disagg_ray.batch.records import Record
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.batch.resume import Options, Plan, make_plan, picture_of
from disagg_ray.config.schema import Config
from disagg_ray.media.video import blank, digest_pixels
from disagg_ray.models.identity import identify_setup

CONFIG = load_config(Path(__file__).parent.parent / "conf" / "tiny_t2v.yaml")
LINES: list[dict[str, Any]] = [{"id": name, "prompt": f"a {name}"} for name in ("cat", "dog", "cow", "ant")]
WITH_SOUND = load_config("builtin:tiny_ltx2")
SPOKEN: list[dict[str, Any]] = [{"id": "cat", "prompt": "a cat", "format": "npy"}]


def plan(
    folder: Path, lines: list[dict[str, Any]] | list[str], config: Config = CONFIG, **options: bool
) -> tuple[list[str], Plan]:
    """Return the ids that are to be made, and the plan."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path = folder / "requests.jsonl"
    path.write_text(text)
    with RequestsFile(path, config) as source, Folder(folder / "out") as out:
        made = make_plan(source, out, config, Options(path, folder / "out", **options))
        return [source.line(int(index)).request.id for index in made.pending], made


def pretend(
    folder: Path,
    name: str,
    status: str = "done",
    setup: str | None = None,
    config: Config = CONFIG,
    format: str = "mp4",
    **more: Any,
) -> Path:
    """Record one of LINES as finished, with a file when it is done; return the file."""
    with RequestsFile(folder / "requests.jsonl", config) as source, Folder(folder / "out") as out:
        source.scan(lambda number, fault: None)
        index = source.find(name)
        assert index is not None
        record = Record(name, status, source.content(index), setup or identify_setup(config), 0.0, **more)
        path = out.video_of(name, format)
        if status == "done":
            path.write_bytes(name.encode())
            record = replace(record, file=path.name, **asdict(state_of(path)))
        out.append(record)
    return path


def test_the_first_run_makes_all_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert plan(tmp_path, LINES)[0] == ["cat", "dog", "cow", "ant"]


def test_the_next_run_makes_what_is_missing(tmp_path: Path) -> None:
    plan(tmp_path, LINES)
    pretend(tmp_path, "dog")
    pending, made = plan(tmp_path, [*LINES, {"id": "new", "prompt": "new"}])
    assert (pending, made.num_done) == (["cat", "cow", "ant", "new"], 1)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Give a wav file on which frames of SPOKEN are to be recorded."""
    plan(tmp_path, SPOKEN, WITH_SOUND)
    path = tmp_path / "out" / "cat.wav"
    path.write_bytes(b"meow")
    return path


def test_frames_whose_sound_vanished_are_made_again(tmp_path: Path, sound: Path) -> None:
    pretend(tmp_path, "cat", config=WITH_SOUND, format="npy", sound=state_of(sound))
    assert plan(tmp_path, SPOKEN, WITH_SOUND)[0] == []
    sound.unlink()
    assert plan(tmp_path, SPOKEN, WITH_SOUND)[0] == ["cat"]


def test_frames_whose_sound_changed_are_made_again(tmp_path: Path, sound: Path) -> None:
    pretend(tmp_path, "cat", config=WITH_SOUND, format="npy", sound=state_of(sound))
    times = sound.stat()
    os.utime(sound, ns=(1, 1))
    assert plan(tmp_path, SPOKEN, WITH_SOUND)[0] == ["cat"]
    assert plan(tmp_path, SPOKEN, WITH_SOUND, verify=True)[0] == []
    sound.write_bytes(b"woof")
    os.utime(sound, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert plan(tmp_path, SPOKEN, WITH_SOUND)[0] == [], "size and time are as they were"
    assert plan(tmp_path, SPOKEN, WITH_SOUND, verify=True)[0] == ["cat"]
    sound.write_bytes(b"cut")
    assert plan(tmp_path, SPOKEN, WITH_SOUND, verify=True)[0] == ["cat"]


def test_of_a_manifest_that_does_not_know_sound_its_file_has_to_be_there(tmp_path: Path, sound: Path) -> None:
    pretend(tmp_path, "cat", config=WITH_SOUND, format="npy")
    assert plan(tmp_path, SPOKEN, WITH_SOUND)[0] == []
    sound.unlink()
    assert plan(tmp_path, SPOKEN, WITH_SOUND)[0] == ["cat"]


def test_a_file_that_vanished_or_changed_is_made_again(tmp_path: Path) -> None:
    plan(tmp_path, LINES)
    pretend(tmp_path, "cat").unlink()
    pretend(tmp_path, "dog").write_bytes(b"longer than it was")
    os.utime(pretend(tmp_path, "cow"), ns=(1, 1))
    pretend(tmp_path, "ant")
    assert plan(tmp_path, LINES)[0] == ["cat", "dog", "cow"]


def test_verify_goes_by_the_digest(tmp_path: Path) -> None:
    plan(tmp_path, LINES)
    os.utime(pretend(tmp_path, "cow"), ns=(1, 1))
    path = pretend(tmp_path, "cat")
    times = path.stat()
    path.write_bytes(b"caT")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert plan(tmp_path, LINES)[0] == ["dog", "cow", "ant"], "size and time are as they were"
    assert plan(tmp_path, LINES, verify=True)[0] == ["cat", "dog", "ant"]


def test_the_last_line_of_an_id_counts(tmp_path: Path) -> None:
    plan(tmp_path, LINES)
    pretend(tmp_path, "cat", "failed")
    pretend(tmp_path, "cat")
    pretend(tmp_path, "dog")
    pretend(tmp_path, "dog", "failed")
    pending, made = plan(tmp_path, LINES)
    assert (pending, made.num_done, made.num_failed) == (["cow", "ant"], 1, 1)


def test_a_failed_request_is_retried_only_on_request_or_when_changed(tmp_path: Path) -> None:
    plan(tmp_path, LINES)
    pretend(tmp_path, "cat", "failed")
    pending, made = plan(tmp_path, LINES)
    assert (pending, made.num_failed) == (["dog", "cow", "ant"], 1)
    pending, made = plan(tmp_path, LINES, retry_failed=True)
    assert (pending, made.num_failed) == (["cat", "dog", "cow", "ant"], 0)
    pending, made = plan(tmp_path, [{"id": "cat", "prompt": "a smaller cat"}, *LINES[1:]])
    assert (pending, made.num_failed) == (["cat", "dog", "cow", "ant"], 0)


def test_a_done_id_that_asks_for_something_else_is_a_bad_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan(tmp_path, LINES)
    path = pretend(tmp_path, "dog")
    changed = [LINES[0], {"id": "dog", "prompt": "a dog", "seed": 1}, *LINES[2:]]
    with pytest.raises(RequestError, match="1 lines of"):
        plan(tmp_path, changed)
    assert "requests.jsonl:2: id: 'dog': its file was made from another request" in caplog.text
    assert path.read_bytes() == b"dog"
    pending, made = plan(tmp_path, changed, skip_invalid=True)
    assert (pending, made.num_done, made.num_invalid) == (["cat", "cow", "ant"], 0, 1)
    path.unlink()
    assert plan(tmp_path, changed)[0] == ["cat", "dog", "cow", "ant"]


def test_an_id_that_differs_from_a_done_one_by_case_only_is_a_bad_line(tmp_path: Path) -> None:
    plan(tmp_path, LINES)
    pretend(tmp_path, "dog")
    pending, made = plan(tmp_path, [LINES[0], {"id": "DOG", "prompt": "a dog"}], skip_invalid=True)
    assert (pending, made.num_invalid) == (["cat"], 1)


def test_another_priority_asks_for_the_same_video(tmp_path: Path) -> None:
    plan(tmp_path, LINES)
    pretend(tmp_path, "cat")
    assert plan(tmp_path, [LINES[0] | {"priority": 5}, *LINES[1:]])[0] == ["dog", "cow", "ant"]


def test_videos_of_another_model_stay_and_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan(tmp_path, LINES)
    pretend(tmp_path, "cat", setup="another")
    pretend(tmp_path, "dog")
    assert plan(tmp_path, LINES)[0] == ["cow", "ant"]
    assert "1 files were made with another model, weights, options or defaults" in caplog.text


def test_a_video_of_another_picture_is_a_bad_line_and_one_of_the_same_in_a_new_file_is_done(tmp_path: Path) -> None:
    config, file = load_config("conf/tiny_i2v.yaml"), tmp_path / "first.png"
    blank(64, 64).save(file)
    lines = [{"id": "cat", "prompt": "a cat", "image": "first.png"}]
    plan(tmp_path, lines, config)
    before = picture_of(file, digest_pixels(blank(64, 64)))
    assert before is not None
    path = pretend(tmp_path, "cat", config=config, pictures={"image": before})
    assert plan(tmp_path, lines, config)[1].num_done == 1
    os.utime(file, ns=(1, 1))
    assert plan(tmp_path, lines, config)[1].num_done == 1, "the same picture"
    blank(64, 64).rotate(90).point(lambda value: value + 1).save(file)
    with pytest.raises(RequestError, match="1 lines of"):
        plan(tmp_path, lines, config)
    file.write_bytes(b"no picture")
    assert plan(tmp_path, lines, config)[1].num_done == 1, "there is nothing to compare with"
    path.unlink()
    assert plan(tmp_path, lines, config)[0] == ["cat"]


def test_every_bad_line_is_in_the_file_and_the_first_are_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps(LINES[0]), *["{"] * (MAX_SHOWN + 10)]
    with pytest.raises(RequestError, match=f"{MAX_SHOWN + 10} lines of"):
        plan(tmp_path, lines)
    assert caplog.text.count("not JSON") == MAX_SHOWN
    assert "and 10 invalid lines more" in caplog.text
    invalid = [json.loads(line) for line in (tmp_path / "out" / INVALID).read_text().splitlines()]
    assert [line["line"] for line in invalid] == list(range(2, MAX_SHOWN + 12))
    pending, made = plan(tmp_path, lines, skip_invalid=True)
    assert (pending, made.num_invalid) == (["cat"], MAX_SHOWN + 10)
    plan(tmp_path, LINES)
    assert not (tmp_path / "out" / INVALID).exists()


@pytest.mark.parametrize("lines", [[], ["{"]], ids=["empty", "only bad ones"])
def test_a_file_without_a_request_is_refused(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no valid request"):
        plan(tmp_path, lines, skip_invalid=True)


def test_a_manifest_is_not_touched_by_planning(tmp_path: Path) -> None:
    plan(tmp_path, LINES)
    pretend(tmp_path, "cat")
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    plan(tmp_path, LINES, verify=True, retry_failed=True)
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


def test_a_folder_that_cannot_take_the_bad_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / INVALID).mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be written"):
        plan(tmp_path, LINES)
