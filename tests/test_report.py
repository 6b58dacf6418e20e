"""What is made of a finished run: trace, picture, page."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from runs import BEGAN, record, simulate, write_manifest

from disagg_ray import cli
from disagg_ray.batch.manifest import MANIFEST
from disagg_ray.batch.records import Record
from disagg_ray.report.drawing import COLOURS, LANE_PX, LEFT, RIGHT, WIDTH, draw
from disagg_ray.report.timeline import lay_out, shares
from disagg_ray.report.trace import to_trace

REPLICAS = {"encoder": 1, "transformer": 3, "decoder": 2}
EVIL = "</style><script>alert(1)</script> & \"quoted\" 'too' <img src=x onerror=alert(2)>\n\u202eright\ud800"


def events(num_requests: int, **changes: float) -> list[dict[str, Any]]:
    works = simulate(num_requests, REPLICAS)
    works = [(name, tuple(replace(t, **changes) for t in timings)) for name, timings in works]  # type: ignore[arg-type]
    found: list[dict[str, Any]] = json.loads(to_trace(lay_out(works)))["traceEvents"]
    return found


def by_thread(found: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    threads = defaultdict(list)
    for event in found:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    return threads


@pytest.mark.parametrize("num_requests", [1, 3, 60, 1000])
def test_every_trace_event_has_what_its_kind_needs(num_requests: int) -> None:
    needed = {"X": {"ts", "dur", "cat"}, "M": {"args"}, "s": {"ts", "id", "cat"}, "f": {"ts", "id", "cat", "bp"},
              "b": {"ts", "id", "cat"}, "e": {"ts", "id", "cat"}, "i": {"ts", "s"}}  # fmt: skip
    found = events(num_requests)
    assert len({event["ph"] for event in found}) >= 4
    for event in found:
        assert {"name", "pid", "tid"} | needed[event["ph"]] <= set(event)
        assert all(isinstance(event[name], int) for name in ("pid", "tid", "ts", "dur") if name in event)
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0


@pytest.mark.parametrize("changes", [{}, {"pull_s": 9.0}, {"compute_s": 20.0}], ids=["plain", "long pulls", "overlaps"])
def test_slices_of_a_thread_never_overlap(changes: dict[str, float]) -> None:
    for of_thread in by_thread(events(60, **changes)).values():
        for before, after in pairwise(sorted(of_thread, key=lambda event: event["ts"])):
            assert before["ts"] + before["dur"] <= after["ts"]


def test_arrows_join_a_requests_stages_inside_their_slices() -> None:
    found = events(60)
    threads = by_thread(found)
    ends = defaultdict(list)
    for event in found:
        if event["ph"] in "sf":
            ends[event["id"]].append(event)
    assert len(ends) == 2 * 60
    for start, finish in ends.values():
        assert (start["ph"], finish["ph"], start["name"]) == ("s", "f", finish["name"])
        assert start["ts"] <= finish["ts"]
        for end in (start, finish):
            around = [
                event["args"]["request"] for event in threads[end["pid"], end["tid"]]
                if event["ts"] <= end["ts"] < event["ts"] + event["dur"]
            ]  # fmt: skip
            assert around == [end["name"]]


def test_waits_begin_and_end_once() -> None:
    found = [event for event in events(60) if event["ph"] in "be"]
    starts = {event["id"]: event["ts"] for event in found if event["ph"] == "b"}
    ends = {event["id"]: event["ts"] for event in found if event["ph"] == "e"}
    assert 2 * len(starts) == len(found) > 60
    assert all(starts[number] < end for number, end in ends.items())


def test_every_replica_is_a_named_thread_of_its_stage() -> None:
    found = events(60)
    stages = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    threads = {e["args"]["name"]: stages[e["pid"]] for e in found if e["name"] == "thread_name"}
    assert {name: stage for name, stage in threads.items() if not name.endswith(" pulls")} == {
        f"{stage}-{index}": stage for stage, count in REPLICAS.items() for index in range(count)
    }


def test_the_rows_of_a_gang_say_how_many_gpus_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    works = simulate(3, {"transformer": 1})
    works = [(name, tuple(replace(t, num_ranks=4, num_gpus=4.0) for t in timings)) for name, timings in works]
    page = report(tmp_path, [record(work, "x") for work in works])
    assert "transformer-0, 4 GPUs" in page.text and "GPU seconds" in page.text
    (row,) = [
        line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:3] == ["transformer", "1", "4"]
    ]
    spent = sum(t.compute_s + t.publish_s for _, timings in works for t in timings)
    assert float(row[-1]) == pytest.approx(4 * spent, abs=0.1)
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["ranks"] for event in trace if event["ph"] == "X" and "ranks" in event["args"]} == {4}


def filled(svg: str, colour: str) -> float:
    """Return the area that the rectangles of a colour's paths take, in pixels."""
    paths = re.findall(rf'd="([^"]+)" fill="{colour}"', svg)
    return sum(float(w) * float(h) for path in paths for w, h in re.findall(r"h([\d.]+)v([\d.]+)", path))


@pytest.mark.parametrize("num_requests", [3, 60, 1000])
def test_as_much_of_the_drawing_is_coloured_as_of_the_time(num_requests: int) -> None:
    timeline = lay_out(simulate(num_requests, {"transformer": 1}))
    lane = (WIDTH - LEFT - RIGHT) * (LANE_PX[1] - LANE_PX[1] // 6)
    for phase, share in shares(timeline)["transformer"].items():
        assert filled(draw(timeline), COLOURS[phase]) / lane == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("count", [1, 30, 300])
def test_any_number_of_replicas_fits_a_drawing(count: int) -> None:
    svg = draw(lay_out(simulate(5 * count, {"encoder": count, "transformer": count})))
    _, _, width, height = map(float, ElementTree.fromstring(svg).attrib["viewBox"].split())
    assert (width, height) < (WIDTH + 1, 3000)
    assert len(svg) < 8e6


def test_the_drawing_is_xml_whatever_a_request_is_called() -> None:
    works = [(EVIL + "\0\x1b[31m", timings) for _, timings in simulate(1, REPLICAS)]
    assert ElementTree.fromstring(draw(lay_out(works), [EVIL])) is not None


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path, records: list[Record], *arguments: str) -> Elements:
    write_manifest(folder, records)
    assert cli.main(["report", str(folder), *arguments]) == 0
    return Elements((Path(arguments[-1]) if arguments else folder).joinpath("report.html").read_text())


def test_what_a_user_or_an_error_says_stays_text(tmp_path: Path) -> None:
    works = simulate(2, REPLICAS)
    name = '<b>"it\'s" #1?&.mp4'
    done = record(works[0], EVIL, id="<i>id<i>", file=name)
    failed = record(
        works[1], EVIL, id="<img src=x onerror=alert(2)>", status="failed", error=EVIL, stages=(), file=None
    )
    page = report(tmp_path, [done, failed])
    plain = report(
        tmp_path / "plain", [record(works[0], "x"), replace(failed, id="x", error="x", request=done.request)]
    )
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert page.text.count(EVIL.replace("\ud800", "?")) == 3
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]


def test_the_page_loads_nothing_but_the_videos(tmp_path: Path) -> None:
    name = """a b#1? 100%25 & "it's".mp4"""
    folder = tmp_path / "out %201&amp;"
    page = report(folder, [record(simulate(1, REPLICAS)[0], "x", file=name)], "--output", str(tmp_path / "report"))
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    (video,) = map(str, links)
    assert (tmp_path / "report" / unquote(video)).resolve() == folder.resolve() / name
    assert "#" not in video
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'; base-uri 'none'")


def test_videos_are_loaded_when_they_are_in_sight_or_when_there_are_too_many_not_at_all(tmp_path: Path) -> None:
    page = report(tmp_path, [record(work, "x") for work in simulate(1002, REPLICAS)])
    videos = [attributes for tag, attributes in page.tags if tag == "video"]
    assert [video["preload"] for video in videos] == ["metadata"] * 1000 + ["none"] * 2
    assert {video["loading"] for video in videos} == {"lazy"}


def test_each_format_is_shown_as_it_can_be(tmp_path: Path) -> None:
    files = ("a.gif", "frames", "b.npy")
    works = simulate(3, REPLICAS)
    page = report(tmp_path, [record(work, "x", file=file) for work, file in zip(works, files, strict=True)])
    shown = [(tag, attributes.get("src", attributes.get("href"))) for tag, attributes in page.tags]
    assert [pair for pair in shown if str(pair[1]).startswith("./")] == [
        ("img", "./a.gif"), ("a", "./frames"), ("a", "./b.npy"),
    ]  # fmt: skip


def test_sound_is_heard_beside_raw_frames(tmp_path: Path) -> None:
    page = report(tmp_path, [record(simulate(1, REPLICAS)[0], "x", file="a.npy", sound_file="a.wav")])
    assert [attributes["src"] for tag, attributes in page.tags if tag == "audio"] == ["./a.wav"]


def test_images_are_called_and_shown_as_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = record(simulate(1, REPLICAS)[0], "x", file="a.png")
    assert made.request is not None
    page = report(tmp_path, [replace(made, request=replace(made.request, num_frames=1))])
    assert [attributes["src"] for tag, attributes in page.tags if tag == "img"] == ["./a.png"]
    assert "Images" in page.text and "frames" not in page.text and "images a minute" in capsys.readouterr().out


def test_the_last_record_of_a_request_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (name, timings), other = simulate(2, REPLICAS)
    work = name, tuple(replace(timing, attempts=2) for timing in timings)
    failed = record(work, "x", status="failed", error="out of memory", stages=())
    lost = record(other, "x", status="failed", error="lost", stages=())
    assert "out of memory" not in report(tmp_path, [failed, lost, record(work, "x"), lost]).text
    assert "1 done, 1 failed, 1 retried; began" in capsys.readouterr().out


def test_a_run_without_a_video_still_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = Record("a", "failed", "", "", BEGAN, error="no replica of the encoder is left")
    assert "no replica of the encoder is left" in report(tmp_path, [failed]).text
    assert capsys.readouterr().out.startswith("0 done, 1 failed, 0 retried\n")  # and no time at which it began


def test_lines_that_lack_numbers_are_left_out(tmp_path: Path) -> None:
    write_manifest(tmp_path, [record(work, "x") for work in simulate(3, REPLICAS)])
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace('"compute_s"', '"compute"', 1).replace('"started": 1', '"started": -1', 1))
    assert cli.main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", [None, MANIFEST], ids=["no manifest", "empty manifest"])
def test_a_folder_of_no_run_is_refused(name: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name:
        (tmp_path / name).touch()
    assert cli.main(["report", str(tmp_path)]) == 2
    assert MANIFEST in capsys.readouterr().err


def test_generate_writes_a_trace(tmp_path: Path) -> None:
    arguments = [
        "generate",
        "--config",
        "conf/tiny_t2v.yaml",
        "--local",
        "--prompt",
        "a red circle",
        "--num-frames",
        "5",
    ]
    arguments += ["--num-inference-steps", "2", "--output", str(tmp_path / "a.mp4"), "--id", "mine"]
    assert cli.main([*arguments, "--trace", str(tmp_path / "new" / "trace.json")]) == 0
    found = json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    assert [event["name"] for event in found if event["ph"] == "X"] == ["mine"] * 3 + ["publish"]


@pytest.mark.parametrize("name", ["trace.mp4", "s3://bucket/trace.json", "file/trace.json"])
def test_a_trace_that_cannot_be_written_shows_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    place = name if "://" in name else str(tmp_path / name)
    arguments = ["generate", "--config", "conf/none.yaml", "--prompt", "x", "--output", str(tmp_path / "a.mp4")]
    assert cli.main([*arguments, "--trace", place]) == 2
    assert "trace: " in capsys.readouterr().err
