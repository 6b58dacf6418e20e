"""Lines of a manifest that are not ours: named and left out, whatever they hold; nothing in the file is touched."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import record, simulate, write_manifest

from disagg_ray import cli
from disagg_ray.batch.lines import MAX_SHOWN
from disagg_ray.batch.manifest import MANIFEST, read_manifest
from disagg_ray.batch.records import MAX_LINE_BYTES, Record, parse

GOOD = record(simulate(1, {"encoder": 1, "decoder": 1})[0], "a cat")
VALUES: dict[str, Any] = json.loads(json.dumps(asdict(GOOD)))


def with_value(path: str, value: Any) -> str:
    """Return the good line with one value replaced; dots lead into objects and lists."""
    values = json.loads(json.dumps(VALUES))
    *outer, last = path.split(".")
    inner = values
    for step in outer:
        inner = inner[int(step) if isinstance(inner, list) else step]
    inner[int(last) if isinstance(inner, list) else last] = value
    return json.dumps(values)


BAD = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "deep inside": '{"id": ' + '{"a":' * 50_000,
    "too many digits": '{"id": "a", "status": "failed", "finished": ' + "9" * 5000 + "}",
    "not a number": '{"id": "a", "status": "failed", "finished": NaN}',
    "too long": " " * MAX_LINE_BYTES + "{}",
    "not UTF-8": "\udcff",
    "NUL": "\0",
    "a list": "[]",
    "no id": with_value("id", None),
    "no time": with_value("finished", None),
    "lone surrogate": with_value("id", "\ud800"),
    "NUL in the id": with_value("id", "a\0b"),
    "escape in the id": with_value("id", "\x1b[31m"),
    "id with a path": with_value("id", "../a"),
    "status": with_value("status", "doing"),
    "huge time": with_value("finished", 1e300),
    "negative time": with_value("finished", -1),
    "infinite time": with_value("finished", "@").replace('"@"', "1e999"),
    "huge seconds": with_value("seconds", 1e300),
    "huge computing": with_value("stages.0.compute_s", 1e300),
    "negative computing": with_value("stages.0.compute_s", -1),
    "text for a number": with_value("stages.1.started", "now"),
    "truth for a number": with_value("stages.1.pull_s", True),
    "huge start": with_value("stages.0.started", 1e17),
    "half an attempt": with_value("stages.0.attempts", 0.5),
    "stage name": with_value("stages.0.stage", "\x1b[2J"),
    "stage of nothing": with_value("stages.0", None),
    "stages": with_value("stages", {"a": 1}),
    "many stages": with_value("stages", [{}] * 10_000),
    "file elsewhere": with_value("file", "/etc/passwd"),
    "file above": with_value("file", "../../a.mp4"),
    "file with NUL": with_value("file", "a\0.mp4"),
    "done without a file": with_value("file", None),
    "huge size": with_value("size", 2**64),
    "request": with_value("request", ["a"]),
    "prompt": with_value("request.prompt", 3),
    "huge width": with_value("request.width", 10**30),
    "images": with_value("request.images", {"image": {"height": -1, "width": 1}}),
    "pictures": with_value("pictures", {"image": {}}),
    "sound without a size": with_value("sound", {"mtime_ns": 1, "sha256": ""}),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_line_is_named_and_left_out_and_the_report_of_the_others_is_made(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_manifest(tmp_path, [GOOD])
    with (tmp_path / MANIFEST).open("ab") as sink:
        sink.write(BAD[what].encode(errors="surrogateescape") + b"\n")
    before = (tmp_path / MANIFEST).read_bytes()
    assert list(read_manifest(tmp_path)) == [GOOD]
    assert "manifest.jsonl:2: not a record of a request; left out: " in caplog.text
    assert "\x1b" not in caplog.text
    assert cli.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_of_many_bad_lines_the_first_are_named_and_the_others_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / MANIFEST).write_text("{\n" * (MAX_SHOWN + 7))
    assert list(read_manifest(tmp_path)) == []
    assert caplog.text.count("not a record") == MAX_SHOWN
    assert "and 7 invalid lines more" in caplog.text


def test_text_that_nothing_can_show_is_shown_as_far_as_it_can_be() -> None:
    found = parse(with_value("request.prompt", "a \ud800\0cat").encode())
    assert found.request is not None
    assert found.request.prompt == "a ??cat"


def test_an_image_of_the_older_form_is_read() -> None:
    found = parse(with_value("request.images", {"image": [64, 96]}).encode())
    assert found.request is not None
    assert (found.request.images["image"].height, found.request.images["image"].width) == (64, 96)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(VALUES)), inner, max_size=4),
    max_leaves=12,
)
PATHS = [*VALUES, *(f"request.{name}" for name in VALUES["request"]), *(f"stages.0.{n}" for n in VALUES["stages"][0])]


@given(st.sampled_from(PATHS), ANY)
def test_any_value_in_a_field_gives_a_record_or_a_fault(path: str, value: Any) -> None:
    try:
        assert isinstance(parse(with_value(path, value).encode()), Record)
    except ValueError as error:
        assert str(error)
