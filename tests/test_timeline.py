"""Spans from timings."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from runs import BEGAN, Work, simulate

from disagg_ray.report.drawing import draw
from disagg_ray.report.timeline import PHASES, Lane, Task, lay_out, shares
from disagg_ray.result import StageTiming

REPLICAS = {"encoder": 1, "transformer": 11, "decoder": 2}


def timing(stage: str = "transformer", started: float = BEGAN, **seconds: float) -> StageTiming:
    """Return one that waits 1 s, pulls 2 s, computes 10 s and publishes 3 s."""
    plain = StageTiming(stage, f"{stage}-0", 1.0, 2.0, started, 10.0, 3.0, 8, "tcp", 0)
    return replace(plain, **seconds)  # type: ignore[arg-type]


def seen(lane: Lane) -> list[tuple[str, float, float]]:
    return [(span.phase, span.start, span.end) for span in lane.spans()]


def test_a_task_is_wait_pull_compute_and_publish_from_where_it_started() -> None:
    timeline = lay_out([("a", [timing()])])
    assert (timeline.began, timeline.seconds) == (BEGAN - 3, 16)
    assert seen(timeline.lanes[0]) == [("wait", 0, 1), ("pull", 1, 3), ("compute", 3, 13), ("publish", 13, 16)]


def test_a_pull_that_hid_behind_computing_is_not_seen_again() -> None:
    works = [("a", [timing()]), ("b", [timing(started=BEGAN + 13, queue_s=12.0)])]
    lane = lay_out(works).lanes[0]
    assert seen(lane)[4:] == [("compute", 16, 26), ("publish", 26, 29)]
    assert [span.end - span.start for span in lane.tasks[1].spans()] == [12, 2, 10, 3]


def test_what_is_not_hidden_of_a_pull_or_a_wait_is_seen() -> None:
    works = [("a", [timing()]), ("b", [timing(started=BEGAN + 20, queue_s=12.0)])]
    assert seen(lay_out(works).lanes[0])[4:6] == [("wait", 16, 21), ("pull", 21, 23)]


def test_tasks_that_a_set_clock_made_overlap_are_cut() -> None:
    lane = lay_out([("a", [timing()]), ("b", [timing(started=BEGAN + 4)])]).lanes[0]
    assert seen(lane)[2:4] == [("compute", 3, 7), ("compute", 7, 17)]


def test_lanes_are_in_the_order_of_the_graph_and_by_number() -> None:
    works = simulate(40, REPLICAS)
    resumed = ("resumed", (replace(works[0][1][2], started=BEGAN + 1),))
    names = [lane.name for lane in lay_out([resumed, *works]).lanes]
    assert names == [f"{stage}-{index}" for stage, count in REPLICAS.items() for index in range(count)]


def test_stages_of_one_process_have_a_lane_each() -> None:
    works = [("a", [timing("encoder", replica="local"), timing("decoder", started=BEGAN + 20, replica="local")])]
    assert [lane.name for lane in lay_out(works).lanes] == ["encoder", "decoder"]


def moved(works: list[Work], seconds: float) -> list[Work]:
    return [(name, tuple(replace(t, started=t.started + seconds) for t in timings)) for name, timings in works]


def test_the_night_between_two_runs_is_left_out() -> None:
    works = simulate(5, {"encoder": 1})
    one = lay_out(works)
    both = lay_out([*works, *moved(works, 30_000.0), *moved(works, 90_000.0)])
    assert both.seconds == pytest.approx(3 * one.seconds)
    assert [pause.at for pause in both.pauses] == pytest.approx([one.seconds, 2 * one.seconds])
    assert sum(pause.seconds for pause in both.pauses) == pytest.approx(90_000 - 2 * one.seconds)
    assert shares(both)["encoder"]["compute"] == pytest.approx(shares(one)["encoder"]["compute"])


def test_a_long_compute_is_no_pause() -> None:
    works = [("a", [timing("encoder"), timing(started=BEGAN + 8000, queue_s=7985.0, compute_s=9000.0)])]
    assert lay_out(works).pauses == ()


def test_whatever_is_timed_a_replica_does_one_thing_at_once_and_its_shares_are_its_time() -> None:
    random_ = random.Random(0)
    parts = ("queue_s", "pull_s", "compute_s", "publish_s")
    works = [
        (str(n), [timing(started=BEGAN + n, **{part: random_.choice([0.0, random_.uniform(0, 3)]) for part in parts})])
        for n in range(200)
    ]
    timeline = lay_out(works)
    spans = list(timeline.lanes[0].spans())
    assert all(before.end <= after.start for before, after in pairwise(spans))
    assert (min(span.start for span in spans), max(span.end for span in spans)) <= (0, timeline.seconds + 1e-6)
    assert 0.8 < sum(shares(timeline)["transformer"].values()) <= 1 + 1e-9


def test_shares_are_of_all_replicas_of_a_stage() -> None:
    works = [("a", [timing()]), ("b", [timing(replica="transformer-1", compute_s=2.0)])]  # type: ignore[arg-type]
    assert shares(lay_out(works)) == {"transformer": dict(zip(PHASES, (12 / 32, 6 / 32, 4 / 32, 2 / 32), strict=True))}


def test_a_gang_weighs_as_much_as_its_ranks() -> None:
    gang = timing(replica="transformer-1", compute_s=2.0, num_ranks=4, num_gpus=4.0)  # type: ignore[arg-type]
    timeline = lay_out([("a", [timing(num_gpus=1.0)]), ("b", [gang])])
    assert [lane.title for lane in timeline.lanes] == ["transformer-0", "transformer-1, 4 GPUs"]
    assert (timeline.num_replicas, timeline.num_ranks) == ({"transformer": 2}, {"transformer": 5})
    assert shares(timeline)["transformer"]["compute"] == pytest.approx((10 + 4 * 2) / (5 * 16))
    assert timeline.gpu_seconds == {"transformer": pytest.approx((10 + 3) + 4 * (2 + 3))}


def test_work_that_took_no_time_is_no_share_of_it() -> None:
    nothing = timing(queue_s=0.0, pull_s=0.0, compute_s=0.0, publish_s=0.0)
    assert shares(lay_out([("a", [nothing])])) == {"transformer": dict.fromkeys(PHASES, 0.0)}
    assert draw(lay_out([("a", [nothing])])).startswith("<svg ")


def test_nothing_makes_an_empty_timeline() -> None:
    timeline = lay_out([("resumed", [])])
    assert (timeline.lanes, timeline.seconds, shares(timeline)) == ((), 0, {})
    assert Task("a", timing(), 0.0).end == 13
