"""The arithmetic of benchmarks, and the simulation that checks the plan."""

from types import SimpleNamespace

import pytest
from benchmarks import plan, ways
from benchmarks import tables as bench
from benchmarks.stock import per_minute

from disagg_ray.planning.plan import equip, make_plan, parse_gpus
from disagg_ray.request import ResolvedRequest
from disagg_ray.result import Result, StageTiming


def make_result(replica: str, started: float, seconds: float) -> Result:
    request = ResolvedRequest("a", "p", "", 64, 64, 9, 4, 1.0, None, 0, 8, "npy", 0, {})
    timing = StageTiming("transformer", replica, 0, 0, started, seconds, 0, 0, "tcp", 0)
    return Result(request, 1.0, (timing,), None, None)


def test_under_a_cap_the_best_stock_is_the_baseline() -> None:
    cell = {"cell": "4 steps, guided", "cap_gib": 40.0}
    rows = [
        cell | {"way": f"{bench.STOCK}, {name}", "per_minute": n, "latency_s": n} for name, n in (("a", 4), ("b", 5))
    ]
    assert bench.ratio(cell | {"per_minute": 10.0}, rows, "per_minute") == 2
    assert bench.ratio(cell | {"latency_s": 8.0}, rows, "latency_s") == 2
    assert bench.ratio(cell | {"per_minute": 10.0, "cap_gib": 24.0}, rows, "per_minute") is None


@pytest.mark.parametrize(
    ("cap_gib", "offloaded"), [(60, []), (40, ["transformer"]), (24, ["transformer", "encoder"]), (8, None)]
)
def test_under_a_cap_the_largest_stages_are_offloaded_as_far_as_needed(
    cap_gib: float, offloaded: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wan 14B's bytes; where even that is too little, the way is a row that says so."""
    peaks = {"encoder": 11_840_000_000, "transformer": 32_550_000_000, "decoder": 10_000_000_000}
    weights = {"encoder": 11_360_000_000, "transformer": 28_640_000_000, "decoder": 510_000_000}
    stages = bench.Stages(tuple(peaks), "transformer")
    way = bench.Layout("all", (bench.Seat("GPU", 2, stages.order),))
    rows: list[ways.Row] = []
    asked: list[str] = []
    monkeypatch.setattr(bench, "measure_way", lambda _bench, _way, *overrides: asked.extend(overrides))
    fake = SimpleNamespace(stages=stages, on_gpu=True, add=rows.append, row=lambda *row: (rows.append(row), row[2]()))
    bench.measure_capped(fake, way, peaks, weights, cap_gib)  # type: ignore[arg-type]
    (row,) = rows
    if offloaded is None:
        assert "no room: encoder and transformer and decoder take 19.7 GB" in row["error"]
        return
    given = dict(override.split("=") for override in asked)
    assert [name.split(".")[1] for name, value in given.items() if value == "group"] == offloaded
    shares = [int(value) for name, value in given.items() if name.endswith("max_vram_bytes")]
    assert 0.99 * cap_gib * 2**30 < sum(shares) <= cap_gib * 2**30
    assert row[0] == "all" + (f", {' and '.join(offloaded)} offloaded" if offloaded else "")


def test_a_busy_share_counts_the_gaps_between_requests() -> None:
    results = [make_result("a", 10, 9), make_result("a", 20, 10), make_result("b", 0, 5), make_result("b", 10, 1)]
    assert ways.busy_share(results, "transformer") == pytest.approx((0.9 + 0.5) / 2)
    assert ways.busy_share(results[:1], "transformer") is None


def test_gpus_add_up_each_by_its_own_time() -> None:
    assert per_minute([[10, 20], [5, 25], [7]]) == 6 + 3
    assert ways.since_first([[10, 20], [5.5, 25]]) == [[4.5, 14.5], [0, 19.5]]


def test_every_layout_is_predicted_within_a_fifth_of_the_simulated_scheduler() -> None:
    """Most within a twentieth; helpers beside a transformer on mixed hardware are furthest off."""
    rows = list(plan.simulate(plan.published_profile(), {"3xH200": {}, "2xH200,2xL40S": {"L40S": 0.5}}))
    assert len(rows) > 10
    assert max(abs(row.error) for row in rows) < 0.2
    assert sum(abs(row.error) < 0.1 for row in rows) > 0.7 * len(rows)


def test_a_simulated_request_is_finished_once() -> None:
    profile = plan.published_profile()
    kinds = {each.kind: each for each in equip(parse_gpus("2xH200"), {"H200": profile}, {})}
    for prediction in make_plan(list(kinds.values()), plan.LOAD).predictions:
        simulation = plan.Simulation(prediction.layout, kinds, plan.LOAD, 50)
        simulation.run()
        assert len(simulation.finished) == 50
