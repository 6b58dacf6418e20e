"""A file of requests: every bad line is named, and a good one is read again as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from disagg_ray import Request, RequestError, load_config
from disagg_ray.batch.request_line import MAX_LINE_BYTES, parse
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.request import check

CONF = Path(__file__).parent.parent / "conf"
T2V = load_config(CONF / "tiny_t2v.yaml")
I2V = load_config(CONF / "tiny_i2v.yaml")
CAT = b'{"id": "cat", "prompt": "a cat"}'
DOG = b'{"id": "dog", "prompt": "a dog"}'


def scan(folder: Path, content: bytes, config: Any = T2V) -> tuple[RequestsFile, dict[int, str]]:
    """Return the scanned file and the faults by line number."""
    (folder / "requests.jsonl").write_bytes(content)
    faults: dict[int, str] = {}
    source = RequestsFile(folder / "requests.jsonl", config)
    source.scan(faults.__setitem__)
    return source, faults


def requests(folder: Path, content: bytes, config: Any = T2V) -> list[Request]:
    source, faults = scan(folder, content, config)
    assert faults == {}
    return [source.line(index).request for index in range(len(source))]


@pytest.mark.parametrize(
    "content",
    [
        CAT + b"\n" + DOG + b"\n",
        CAT + b"\n" + DOG,
        b"\xef\xbb\xbf" + CAT + b"\r\n" + DOG + b"\r\n",
        b"\n  \n" + CAT + b"\n\r\n\n" + DOG + b"\n\n",
        b"\xef\xbb\xbf\n" + CAT + b"\n" + DOG,
    ],
)
def test_lines_end_as_they_like(content: bytes, tmp_path: Path) -> None:
    assert [(r.id, r.prompt) for r in requests(tmp_path, content)] == [("cat", "a cat"), ("dog", "a dog")]


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
def test_a_file_without_a_request_has_none(content: bytes, tmp_path: Path) -> None:
    source, faults = scan(tmp_path, content)
    assert (len(source), faults, source.find("cat")) == (0, {}, None)


BAD = [
    (b"{", "not JSON: "),
    (b"nonsense", "not JSON: Expecting value at character 1"),
    (b'{"prompt": "a"} {}', "not JSON: Extra data at character 17"),
    (b"[" * 100_000, "not JSON that can be used"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON that can be used"),
    (b'{"prompt": "a", "prompt": "b"}', "prompt is given twice"),
    (b'{"prompt": "\xff"}', "not UTF-8: byte 13 of the line is 0xff"),
    (b'["a cat"]', 'not an object: write {"prompt": "..."}, not a list'),
    (b"null", "not an object"),
    (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}', "the line is over 1048576 bytes"),
    (b'{"promt": "a cat"}', "promt: no such field; did you mean prompt?"),
    (
        b'{"prompt": "a", "": 1}',
        ": no such field; there are audio_guidance_rescale, audio_guidance_scale, audio_modality_scale, ",
    ),
    (b"{}", "invalid prompt='': must say what to show"),
    (b'{"prompt": null}', "invalid prompt='': must say what to show"),
    (b'{"prompt": ["a"]}', "invalid prompt=['a']: must be text, not a list"),
    (b'{"prompt": 5}', "invalid prompt=5: must be text, not an int"),
    (b'{"prompt": "a", "seed": true}', "invalid seed=true: must be a whole number, not a bool"),
    (b'{"prompt": "a", "num_frames": 8}', "invalid num_frames=8: must be 4k + 1; the nearest is 9"),
    (b'{"prompt": "a", "guidance_scale": NaN}', "invalid guidance_scale=nan: must be a finite number of at least 0"),
    (b'{"prompt": "a", "height": 1e400}', "invalid height=inf: must be a whole number, not a float"),
    (b'{"prompt": "\\ud800"}', "it holds half of a character"),
    (b'{"prompt": "a", "format": "avi"}', "invalid format='avi': must be one of mp4, gif, frames, npy"),
    (b'{"prompt": "a", "image": "x.png"}', "image: given, but a model of task t2v takes none"),
    (b'{"prompt": "a", "image": 3}', "image: 3 is no path"),
    (b'{"prompt": "a", "image": "~\\u0000x"}', "image: given, but a model of task t2v takes none"),
    (b'{"prompt": "a", "\\u001b[31m\\u202e": 1}', "\\x1b[31m\\u202e: no such field"),
    (b'{"\\u009b": 1, "\\u009b": 2}', "\\x9b is given twice"),
    (b'{"prompt": "a", "fps": 24.5}', "invalid fps=24.5: must be a whole number, not a float"),
    *((b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}", "") for depth in (400, 900, 990)),
]


@pytest.mark.parametrize(("line", "fault"), BAD, ids=[fault[:30] for _, fault in BAD])
def test_a_bad_line_is_named_and_the_others_stay(line: bytes, fault: str, tmp_path: Path) -> None:
    source, faults = scan(tmp_path, CAT + b"\n" + line + b"\n" + DOG)
    assert list(faults) == [2]
    assert fault in faults[2]
    assert faults[2].isprintable()
    assert [source.line(index).request.id for index in range(len(source))] == ["cat", "dog"]


def test_24_0_asks_for_the_same_video_as_24(tmp_path: Path) -> None:
    source, faults = scan(tmp_path, b'{"prompt": "a cat", "fps": 24}\n{"prompt": "a cat", "fps": 24.0, "id": "b"}')
    assert not faults
    assert source.content(0) == source.content(1)
    assert source.line(1).request.fps == 24


def test_an_image_path_that_none_can_have_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("~\0x", "a\0b", "~\ud800", "\ud800.png", "x" * 5000):
        with pytest.raises(RequestError, match=r"^image: ") as caught:
            line = parse(json.dumps({"prompt": "a cat", "image": name}).encode(), tmp_path)
            check(line.request, load_config("conf/tiny_i2v.yaml"))
        assert str(caught.value).isprintable()


NAMES = ["", ".", "..", "../x", "a/b", "/etc/x", ".lock", "a\0b", "a\nb", "x" * 201, "é" * 101, "\ud800", 7, ["a"]]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_id_that_is_no_file_name_is_refused(name: object, tmp_path: Path) -> None:
    _, faults = scan(tmp_path, json.dumps({"prompt": "a cat", "id": name}).encode())
    assert faults[1].startswith("id: ")


@pytest.mark.parametrize("name", ["a", "a b", "x" * 200, "é" * 100, "v1.5", "-a", "a..b", "~", "猫", "manifest", "a."])
def test_an_id_that_is_a_file_name_is_kept(name: str, tmp_path: Path) -> None:
    (request,) = requests(tmp_path, json.dumps({"prompt": "a cat", "id": name}).encode())
    assert request.id == name
    (tmp_path / f"{name}.mp4").touch()


def test_a_png_folder_s_name_holds_no_dot(tmp_path: Path) -> None:
    _, faults = scan(tmp_path, b'{"prompt": "a cat", "id": "a.mp4", "format": "frames"}')
    assert "the name of a folder of frames holds no dot" in faults[1]


def test_of_two_lines_with_one_id_the_second_is_bad(tmp_path: Path) -> None:
    other = b'{"id": "cat", "prompt": "another"}'
    source, faults = scan(tmp_path, b"\n".join([CAT, DOG, other, b"", CAT]))
    assert faults == dict.fromkeys((3, 5), "id: 'cat' is also on line 1; ids are unique")
    assert [source.line(index).request.prompt for index in range(len(source))] == ["a cat", "a dog"]
    assert [source.find("cat"), source.find("dog"), source.number(1)] == [0, 1, 2]


SAME = [("cat", "CAT"), ("caf\u00e9", "cafe\u0301"), ("STRASSE", "straße"), ("\u00c9", "e\u0301")]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_ids_that_a_file_system_may_take_for_one_are_duplicates_and_both_are_named(
    first: str, second: str, tmp_path: Path
) -> None:
    lines = [json.dumps({"id": name, "prompt": "a"}).encode() for name in (first, "other", second)]
    source, faults = scan(tmp_path, b"\n".join(lines))
    assert list(faults) == [3]
    assert f"id: {second!r} differs from {first!r} on line 1 only by case or Unicode form" in faults[3]
    assert [source.line(index).request.id for index in range(len(source))] == [first, "other"]
    assert (source.find(first), source.find(second)) == (0, None)


def test_equal_lines_without_an_id_are_duplicates_however_they_are_written(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "a c\\u0061t", "seed": 1}', b' {"seed":1, "prompt":"a cat", "fps":null}',
        b'{"prompt": "a cat", "seed": 1, "priority": 2}', b'{"prompt": "a cat", "seed": 2}',
    ]  # fmt: skip
    source, faults = scan(tmp_path, b"\n".join(lines))
    assert list(faults) == [2, 3]
    assert len(source) == 2


def test_a_derived_id_and_a_drawn_seed_are_the_same_in_every_run(tmp_path: Path) -> None:
    lines = b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n{"id": "cat", "prompt": "a cat"}'
    first, again = requests(tmp_path, lines), requests(tmp_path, lines)
    assert first == again
    assert (first[0].id, first[0].seed) == ("455c4fd842ca9429", 4277336206)
    assert len({request.seed for request in first}) == 3, "the seed follows from id and content"
    assert all(0 <= (request.seed or 0) < 2**32 for request in first)


def test_an_image_is_found_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").touch()
    monkeypatch.chdir("/")
    line = {"prompt": "a cat", "image": "pictures/cat.png"}
    (relative,) = requests(tmp_path, json.dumps(line).encode(), I2V)
    (absolute,) = requests(tmp_path, json.dumps(line | {"image": str(tmp_path / "pictures/cat.png")}).encode(), I2V)
    assert relative.image == absolute.image == tmp_path / "pictures" / "cat.png"


@pytest.mark.parametrize("image", ["none.png", ".", "pipe", "x" * 300, "a\0b"])
def test_an_image_that_is_no_file_is_refused_unopened(image: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    _, faults = scan(tmp_path, json.dumps({"prompt": "a cat", "image": image}).encode(), I2V)
    assert faults[1].startswith("image: ")


def test_a_missing_side_is_not_guessed_before_the_image_is_opened(tmp_path: Path) -> None:
    (tmp_path / "cat.png").touch()
    (request,) = requests(tmp_path, b'{"prompt": "a cat", "image": "cat.png", "height": 2048}', I2V)
    assert (request.height, request.width) == (2048, None)


def test_a_file_changed_in_place_is_noticed(tmp_path: Path) -> None:
    source, _ = scan(tmp_path, CAT + b"\n" + DOG)
    with source.path.open("ab") as sink:
        sink.write(b"\n")
    with pytest.raises(RequestError, match="was changed while it was read"):
        source.line(1)


def test_a_file_replaced_by_another_is_read_to_its_end(tmp_path: Path) -> None:
    source, _ = scan(tmp_path, CAT + b"\n" + DOG)
    (tmp_path / "new").write_bytes(b"nothing")
    (tmp_path / "new").replace(source.path)
    assert source.line(1).request.id == "dog"


@pytest.mark.parametrize("path", ["none.jsonl", ".", "-", "/dev/null"])
def test_what_cannot_be_read_twice_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="requests: "):
        RequestsFile(Path(path), T2V)


def test_many_lines_are_found_by_their_ids(tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"clip-{n}", "prompt": "a cat"}) for n in range(2000)]
    source, faults = scan(tmp_path, "\n".join(lines).encode())
    assert not faults
    for n in (0, 1, 999, 1999):
        assert source.find(f"clip-{n}") == n
        assert source.line(n).request.id == f"clip-{n}"
    assert source.find("clip-2000") is None
