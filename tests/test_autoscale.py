"""How many replicas a stage is to have: the decisions, without a cluster."""

from contextlib import closing
from dataclasses import replace

import pytest
from test_hangs import fail_once

from disagg_ray import load_config
from disagg_ray.config.deployment import ServiceConfig
from disagg_ray.service import lifecycle
from disagg_ray.service.autoscale import Load, Scaler
from disagg_ray.service.pipeline import ServicePipeline

SETTINGS = ServiceConfig(target_wait_s=10, patience_s=5, idle_s=20)
CALM = Load(least=1, most=4, wanted=1, ready=1, starting=0, busy=1, outstanding_s=5, room=10)
LATE = replace(CALM, outstanding_s=25)
SPARE = replace(CALM, wanted=3, ready=3, busy=1, outstanding_s=1)


def decide(*seen: tuple[float, Load]) -> list[int]:
    """Return what is decided when a scaler is shown these loads at these times."""
    scaler = Scaler(SETTINGS)
    decisions = [scaler.decide("transformer", load, now) for now, load in seen]
    return [decision.replicas for decision in decisions if decision is not None]


def test_a_wait_that_stays_too_long_adds_as_many_as_bring_it_down():
    assert decide((0, LATE), (4, LATE)) == []
    assert decide((0, LATE), (5, LATE)) == [3]
    assert decide((0, replace(LATE, outstanding_s=1000)), (5, replace(LATE, outstanding_s=1000))) == [4]


def test_a_short_burst_adds_nothing():
    assert decide((0, LATE), (4, CALM), (6, LATE), (10, LATE)) == []


@pytest.mark.parametrize(
    "load", [replace(LATE, room=0), replace(LATE, wanted=2, starting=1), replace(LATE, wanted=4, ready=4)]
)
def test_none_is_added_without_room_or_while_one_starts_or_above_the_most(load):
    assert decide((0, load), (10, load)) == []


def test_a_cluster_that_grows_is_asked_for_more_than_it_has_room_for():
    scaler = Scaler(replace(SETTINGS, cluster_grows=True))
    assert scaler.decide("transformer", replace(LATE, room=0), 0) is None
    decision = scaler.decide("transformer", replace(LATE, room=0), 5)
    assert decision.replicas == 3
    assert decision.reason == "wait"
    assert "a wait of 25.0 s is predicted, target_wait_s is 10" in decision.detail


def test_replicas_that_were_to_spare_all_the_time_are_taken_away():
    assert decide((0, SPARE), (19, SPARE)) == []
    assert decide((0, SPARE), (20, SPARE)) == [1]
    assert decide((0, SPARE), (10, replace(SPARE, busy=2)), (20, SPARE)) == [2]
    assert decide((0, SPARE), (10, replace(SPARE, busy=3)), (20, SPARE), (39, SPARE)) == []


def test_one_that_still_starts_is_not_taken_away():
    starting = replace(SPARE, ready=1, starting=2)
    assert decide((0, starting), (30, starting), (31, SPARE), (50, SPARE)) == []


def test_a_replica_that_does_not_start_holds_up_neither_more_nor_fewer():
    late, spare = replace(LATE, wanted=2), replace(SPARE, ready=2)
    assert decide((0, late), (5, late)) == [4]
    assert decide((0, spare), (20, spare)) == [2]
    assert decide((0, replace(spare, busy=2)), (30, replace(spare, busy=2))) == []


def test_never_fewer_than_the_least_nor_while_work_waits():
    idle = replace(SPARE, least=2, busy=0)
    assert decide((0, idle), (20, idle)) == [2]
    assert decide((0, replace(SPARE, outstanding_s=50)), (20, replace(SPARE, outstanding_s=50, room=0))) == []


@pytest.mark.proof
def test_scaling_goes_on_after_it_failed(
    cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bounds = [f"stages.{stage}.replicas={{min: 1, max: 2}}" for stage in ("encoder", "transformer", "decoder")]
    decided_again = fail_once(monkeypatch, Scaler, "decide")
    pipeline = ServicePipeline(load_config("conf/tiny_t2v.yaml", "fused=true", *bounds), "scaling", lambda _: None)
    with closing(pipeline.host):
        try:
            assert decided_again.wait(120)
        finally:
            lifecycle.down("scaling", 0.0)
    assert "background task scale failed; it is started again" in caplog.text
