"""Predictions from made-up profiles, and a profile of the tiny model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from disagg_ray.cli.command import main
from disagg_ray.config.load import load_config
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.driver.cluster import total_resources
from disagg_ray.errors import PlanError
from disagg_ray.planning.layouts import Layout, Seat, Stages, layouts, to_settings, to_yaml
from disagg_ray.planning.parallel import CFG_SPEEDUP, ROWS_SPEEDUP, ULYSSES_SPEEDUP, candidates
from disagg_ray.planning.plan import Plan, equip, explain, footnotes, make_plan, parse_gpus
from disagg_ray.planning.predict import CALL_S, Hardware
from disagg_ray.planning.profile import (
    VERSION,
    Load,
    Point,
    Profile,
    StageProfile,
    check_profile,
    read_profile,
    write_profile,
)
from disagg_ray.report.tables import print_plan

CONF = Path(__file__).parent.parent / "conf"
LOAD = Load(480, 832, 81, 8)
STAGES = Stages(("encoder", "transformer", "decoder"), "transformer")
GB = 1_000_000_000


def make_stage(
    name: str, seconds: float, weights_gb: float, work_gb: float = 0, finish_s: float = 0, host_s: float = 0
) -> StageProfile:
    point = Point(LOAD, seconds, seconds - host_s, finish_s, int(work_gb * GB), 0)
    return StageProfile(name, name == "transformer", 1.0, int(weights_gb * GB), 0, 0, 0, (point,), num_blocks=40)


def make_profile(kind: str = "H200", finish_s: float = 0, transformer_gb: float = 3, host_s: float = 0) -> Profile:
    """Encoder 1 s, transformer 6 s, decoder 3 s of which `host_s` need no GPU, on a GPU of 100 GB."""
    stages = (
        make_stage("encoder", 1, 11), make_stage("transformer", 6, transformer_gb, 2),
        make_stage("decoder", 3, 1, 9, finish_s, host_s),
    )  # fmt: skip
    return Profile(VERSION, kind, kind, 100 * GB, "exact", {}, "wan", "npy", 1e9, stages)


def plan(count: int, **changes: float) -> Plan:
    return make_plan([Hardware("H200", count, 100 * GB, make_profile(**changes))], LOAD)


def find(made: Plan, name: str) -> float:
    return next(p.per_minute for p in made.predictions if p.layout.name == name)


def test_gpus_are_read_with_their_memory() -> None:
    assert parse_gpus("8xH200, 4xRTX4090:24") == {"H200": (8, None), "RTX4090": (4, 24 * GB)}


@pytest.mark.parametrize("spec", ["", "0xH200", "H200", "8H200", "-1xH200", "8xH200;4xL40S", "1xA40,2xA40", "2xT4:x"])
def test_a_wrong_spec_says_what_is_wrong(spec: str) -> None:
    with pytest.raises(PlanError, match=r"gpus: .*;|gpus: .*as 8xH200"):
        parse_gpus(spec)


BESIDE = "transformer on all, encoder and decoder beside it on 1"


@pytest.mark.parametrize(
    ("count", "changes", "name", "seconds"),
    [
        (2, {}, "fused", 10 / 2),
        (2, {}, "all stages on every GPU", 10 / 2),
        (2, {}, "encoder and decoder on 1, transformer on the others", 6),
        (3, {}, "encoder and decoder on 1, transformer on the others", 4),
        (3, {}, BESIDE, 1 + 3 + 6 / LOAD.passes),  # the helpers wait for one forward
        (2, {"finish_s": 2}, "fused", 10 / 2),  # a file is encoded beside the next video
        (2, {"finish_s": 15}, "fused", 15 / 2),
        (2, {"host_s": 1}, "fused", 10 / 2),
        (2, {"host_s": 1}, "all stages on every GPU", 9 / 2),  # work on the host costs no GPU time
    ],
)
def test_a_layout_makes_a_video_in_the_seconds_of_its_slowest_part(
    count: int, changes: dict[str, float], name: str, seconds: float
) -> None:
    made = plan(count, **changes)
    assert find(made, name) == pytest.approx(60 / seconds)
    assert made.best.layout.fused == ("host_s" not in changes)
    assert made.fused is not None
    assert made.fused.latency_s == pytest.approx(10 + CALL_S + changes.get("finish_s", 0))


def test_helpers_that_need_little_leave_the_rest_of_their_gpu_to_its_transformer() -> None:
    many_steps = replace(LOAD, passes=80)
    made = make_plan([Hardware("H200", 3, 100 * GB, make_profile())], many_steps)
    assert find(made, BESIDE) == pytest.approx(3 * 60 / 64)


def test_helpers_that_never_call_a_model_take_nothing_of_a_gpu() -> None:
    without = replace(make_profile(), stages=(make_profile().stages[1], make_stage("decoder", 3, 1, host_s=3)))
    made = make_plan([Hardware("H200", 1, 100 * GB, without)], LOAD)
    assert find(made, "all stages on every GPU") == pytest.approx(10)


def test_where_the_whole_does_not_fit_a_split_is_best() -> None:
    made = plan(2, transformer_gb=85)
    assert made.fused is None
    assert made.best.layout.name == "encoder and decoder on 1, transformer on the others"
    assert "fused does not fit" in explain(made)


def test_a_model_of_images_is_planned_in_images(capsys: pytest.CaptureFixture[str]) -> None:
    made = replace(plan(2), load=Load(480, 832, 1, 8))
    print_plan(made, None)
    printed = capsys.readouterr().out + explain(made)
    assert "832x480, 8 passes" in printed and "images/min" in printed and "images a minute" in printed
    assert "video" not in printed and "frames" not in printed


def test_weights_that_fit_nowhere_are_an_error() -> None:
    with pytest.raises(PlanError, match=r"no layout fits; .* 102\.\d GB of 95\.0"):
        plan(2, transformer_gb=100)


def test_a_slow_kind_with_little_memory_takes_the_helpers() -> None:
    fast, slow = make_profile(transformer_gb=60), make_profile("L40S", transformer_gb=60)
    made = make_plan([Hardware("H200", 4, 100 * GB, fast), Hardware("L40S", 6, 48 * GB, slow, speed=0.5)], LOAD)
    assert Seat("H200", 4, ("transformer",)) in made.best.layout.seats
    assert made.best.per_minute == pytest.approx(40)  # all that four transformers do


@pytest.mark.parametrize(
    ("gpus", "name", "num_requests", "seconds"),
    [
        ({"H200": 1}, "fused", 1, 10),
        ({"H200": 1}, "fused", 3, 30),
        ({"H200": 2}, "fused", 2, 10),  # one each
        ({"H200": 2}, "fused", 3, 20),
        ({"H200": 2}, "encoder and decoder on 1, transformer on the others", 3, 10 + 2 * 6),
        ({"H200": 4}, "encoder and decoder on 1, transformer on the others", 4, 10 + 3 * 4),
        ({"H200": 1, "L40S": 1}, "fused", 3, 20),  # two on the fast one, one on that of half its speed
    ],
)
def test_requests_that_arrive_at_once_take_the_rounds_of_the_slowest_part(
    gpus: dict[str, int], name: str, num_requests: int, seconds: float
) -> None:
    hardware = [Hardware(k, count, 100 * GB, make_profile(), 1 if k == "H200" else 0.5) for k, count in gpus.items()]
    made = make_plan(hardware, LOAD, num_requests)
    (found,) = [prediction for prediction in made.predictions if prediction.layout.name == name]
    assert found.makespan_s(num_requests) == pytest.approx(seconds, abs=0.1)
    assert found.makespan_s(1) == found.latency_s


@pytest.mark.parametrize("counts", [{"H200": 3, "L40S": 2}, {"H200": 4}], ids=str)
def test_layouts_use_all_gpus_and_hold_all_stages_each_once(counts: dict[str, int]) -> None:
    found = layouts(counts, STAGES)
    assert len({(layout.fused, frozenset(layout.seats)) for layout in found}) == len(found) > 9
    for layout in found:
        assert sum(seat.count for seat in layout.seats) == sum(counts.values())
        assert all(layout.replicas(stage) for stage in STAGES.order)


@pytest.mark.parametrize("layout", layouts({"H200": 3, "L40S": 2}, STAGES) + layouts({"H200": 2}, STAGES), ids=str)
def test_every_layout_s_yaml_is_a_configuration_with_its_replicas(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(f"base: {CONF / 'wan21_t2v_1_3b.yaml'}\n" + to_yaml(to_settings(layout, STAGES)))
    config = load_config(path)
    assert total_resources(config.stages)["GPU"] <= 5
    if layout.fused:
        assert config.stages["fused"].num_replicas == layout.replicas("transformer")
    else:
        assert {name: stage.num_replicas for name, stage in config.stages.items()} == {
            stage: layout.replicas(stage) for stage in STAGES.order
        }


def test_seconds_grow_with_passes_in_a_line_and_with_size_by_a_power() -> None:
    small, large = Load(480, 832, 41, 4), Load(480, 832, 81, 4)
    measured = ((small, 2.0), (replace(small, passes=8), 3.0))
    points = [Point(load, seconds, seconds / 2, 0, 0, 0) for load, seconds in measured]
    ratio = large.volume / small.volume
    points += [replace(p, load=replace(p.load, num_frames=81), compute_s=p.compute_s * ratio**2) for p in points]
    stage = replace(make_stage("transformer", 1, 1), points=tuple(points))
    assert stage.compute_s(replace(small, passes=16)) == pytest.approx(5)
    assert stage.turn_s(replace(small, passes=16)) == pytest.approx(2.5)
    middle = replace(small, num_frames=61)
    assert stage.compute_s(middle) == pytest.approx(2 * (middle.volume / small.volume) ** 2)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    write_profile(make_profile(), tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == make_profile()


@pytest.mark.parametrize(
    ("text", "said"),
    [("no", "not JSON"), ("[]", "version None"), ('{"version": 99}', "version 99"), ('{"version": 5}', "incomplete")],
)
def test_a_damaged_profile_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=said):
        read_profile(path)
    with pytest.raises(PlanError, match="cannot be read"):
        read_profile(tmp_path / "other.json")


def test_a_profile_of_another_preset_gpu_or_version_is_refused() -> None:
    check_profile(make_profile(), "H200", "exact")
    check_profile(replace(make_profile(), versions={"driver of a GPU": "580.1"}), "H200", "exact")
    with pytest.raises(PlanError, match=r"^invalid --profile of 'L4': it was measured on H200 \(H200\); measure on L4"):
        check_profile(make_profile(), "L4", "exact")
    with pytest.raises(PlanError, match=r"with speed=exact, and the configuration has speed=fast; run .*--speed fast"):
        check_profile(make_profile(), "H200", "fast")
    with pytest.raises(PlanError, match=r"measured with torch 1\.0 \(here [\d.]+\); measure again"):
        check_profile(replace(make_profile(), versions={"torch": "1.0"}), "H200", "exact")


def test_a_kind_needs_a_profile_or_a_speed() -> None:
    gpus, profiles = parse_gpus("1xH200,1xL40S"), {"H200": make_profile()}
    with pytest.raises(PlanError, match="no profile of L40S"):
        equip(gpus, profiles, {})
    with pytest.raises(PlanError, match=r"invalid --factors 'L4'=0\.5"):
        equip(gpus, profiles, {"L4": 0.5})
    with pytest.raises(PlanError, match="invalid --factors 'L40S'=nan: must be a positive number"):
        equip(gpus, profiles, {"L40S": math.nan})
    with pytest.raises(PlanError, match="memory of RTX9 is not known"):
        equip(parse_gpus("1xRTX9"), profiles, {"RTX9": 1.0})
    h200, l40s = equip(gpus, profiles, {"L40S": 0.5})
    assert (h200.memory_bytes, l40s.memory_bytes, l40s.speed) == (100 * GB, 48 * GB, 0.5)


def test_a_thousand_gpus_are_planned() -> None:
    hardware = [Hardware("H200", 700, 100 * GB, make_profile()), Hardware("L40S", 300, 48 * GB, make_profile(), 0.4)]
    made = make_plan(hardware, LOAD)
    assert made.best.per_minute <= 60 * (700 + 300 * 0.4) / 10 * 1.001


GANGS = tuple(candidates(8, 40, guided=True))
CFG, SHARDED = ParallelConfig(cfg=2), ParallelConfig(cfg=2, shard_weights=True)
ROWS = ParallelConfig(rows=2)


def ranks_of(layout: Layout) -> ParallelConfig:
    return layout.parallel_of("transformer")


def plan_gangs(count: int, *gangs: ParallelConfig, profile: Profile | None = None) -> Plan:
    return make_plan([Hardware("H200", count, 100 * GB, profile or make_profile())], LOAD, None, gangs, "latency")


@pytest.mark.parametrize(
    ("heads", "guided", "found"),
    [
        (40, True, [(2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8)]),
        (12, True, [(2, 1), (1, 2), (2, 2), (1, 4), (2, 4)]),
        (40, False, [(1, 2), (1, 4), (1, 8)]),
    ],
)
def test_gangs_divide_the_heads_and_have_no_idle_half(heads: int, guided: bool, found: list[tuple[int, int]]) -> None:
    assert [(p.cfg, p.ulysses) for p in candidates(16, heads, guided=guided)] == found
    assert list(candidates(1, heads, guided=guided)) == []


def test_a_gang_makes_one_video_sooner_and_its_seconds_are_marked_as_estimated() -> None:
    made = plan_gangs(2, CFG, ParallelConfig(ulysses=2))
    assert made.best.latency_s == pytest.approx(1 + 3 + 6 / CFG_SPEEDUP + 3 * CALL_S)
    assert (made.best.estimated, ranks_of(made.best.layout)) == (True, CFG)
    ulysses = next(p for p in made.predictions if ranks_of(p.layout).ulysses == 2)
    assert ulysses.latency_s == pytest.approx(1 + 3 + 6 / ULYSSES_SPEEDUP + 3 * CALL_S)
    assert "2 GPUs denoise one video together; without a gang it takes 10." in explain(made)
    assert [note.partition(":")[0] for note in footnotes(made)] == ["* estimated from one GPU", "cfg 2"]


def test_what_was_measured_of_a_gang_is_used_as_it_is() -> None:
    gang = replace(make_stage("transformer", 3.5, 2, 1), parallel=CFG)
    made = plan_gangs(2, CFG, profile=replace(make_profile(), gangs=(gang,)))
    assert made.best.latency_s == pytest.approx(1 + 3 + 3.5 + 3 * CALL_S)
    assert not made.best.estimated
    assert len(footnotes(made)) == 1


def test_a_decoder_of_several_ranks_is_planned_with_and_without_a_transformer_of_several() -> None:
    made = plan_gangs(4, CFG, ROWS)
    decode_s = 3 / ROWS_SPEEDUP
    assert made.best.layout.gangs == (("transformer", CFG), ("decoder", ROWS))
    assert made.best.latency_s == pytest.approx(1 + decode_s + 6 / CFG_SPEEDUP + 3 * CALL_S)
    assert made.best.per_minute == pytest.approx(
        60 / max(6 / CFG_SPEEDUP, 1 + decode_s)
    )  # the encoder is beside a rank
    assert "2 GPUs denoise one video together, 2 GPUs decode one video together; without" in explain(made)
    assert "* rows" in footnotes(made)[1]
    alone = next(p for p in made.predictions if p.layout.gangs == (("decoder", ROWS),))
    assert alone.latency_s == pytest.approx(1 + decode_s + 6 + 3 * CALL_S)
    assert not any(dict(p.layout.gangs).get("decoder") for p in plan_gangs(2, CFG, ROWS).predictions)


def test_videos_a_minute_count_each_gang_once() -> None:
    made = plan_gangs(9, ParallelConfig(cfg=2, ulysses=2))
    found = find(made, "encoder and decoder on 1, transformer on the others, cfg 2, ulysses 2")
    gang_s = 6 / CFG_SPEEDUP / ULYSSES_SPEEDUP
    assert found == pytest.approx(60 * min(2 / gang_s, 1 / 4))
    assert find(plan(2), "fused") == 12  # without gangs to look at there are none


def test_weights_are_shared_only_where_whole_ones_do_not_fit() -> None:
    fitting = plan_gangs(2, CFG, SHARDED)
    assert {ranks_of(p.layout) for p in fitting.predictions} == {ParallelConfig(), CFG}
    large = plan_gangs(3, CFG, SHARDED, profile=make_profile(transformer_gb=150))
    assert {ranks_of(p.layout) for p in large.predictions} == {SHARDED}
    held = SHARDED.held(150 * GB, 40)
    assert held == 75 * GB + 3 * 150 * GB // 40  # an equal part, and three blocks whole
    assert 0 < max(large.best.gpu_bytes) - held - 2 * GB < GB
    assert "* shard_weights" in footnotes(large)[1]


@pytest.mark.parametrize("counts", [{"H200": 2}, {"H200": 8}, {"H200": 5, "L40S": 4}], ids=str)
def test_the_yaml_of_every_layout_with_gangs_asks_for_their_gpus(counts: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    found = [layout for layout in layouts(counts, STAGES, (*GANGS[:: len(counts)], ROWS)) if layout.gangs]
    assert {stage for layout in found for stage, _ in layout.gangs} >= {"transformer"}
    assert (max(counts.values()) < 3) == all(ranks != ROWS for layout in found for _, ranks in layout.gangs)
    for layout in found:
        path.write_text(f"base: {CONF / 'wan21_t2v_14b.yaml'}\n" + to_yaml(to_settings(layout, STAGES)))
        stages = load_config(path).stages
        assert {name: stage.num_replicas for name, stage in stages.items()} == {
            stage: layout.replicas(stage) for stage in STAGES.order
        }
        for name, stage in stages.items():
            sizes = {group.parallel.size for group in stage.replica_groups.values()}
            assert sizes == {layout.parallel_of(name).size}
        assert total_resources(stages)["GPU"] <= sum(counts.values())


def test_a_gang_of_the_configuration_is_undone_where_the_best_layout_has_none(tmp_path: Path) -> None:
    path, base = tmp_path / "plan.yaml", ParallelConfig(cfg=2, ulysses=2, spread=True)
    written = "{num_gpus: 1, parallel: {cfg: 2, ulysses: 2, spread: true}}"
    (tmp_path / "base.yaml").write_text(f"base: {CONF / 'wan21_t2v_14b.yaml'}\nstages:\n  transformer: {written}\n")
    for layout in layouts({"H200": 4}, STAGES, [CFG]):
        path.write_text("base: base.yaml\n" + to_yaml(to_settings(layout, STAGES, {"transformer": base})))
        config = load_config(path)
        assert config.stages["fused" if layout.fused else "transformer"].parallel == ranks_of(layout)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parallel", "cfg:2"], "invalid --parallel=cfg:2: write cfg=2/ulysses=2"),
        (["--parallel", "cfg=3"], "invalid stages.transformer.parallel.cfg=3: must be from 1 to 2"),
        (
            ["--parallel", "ulysses=80", "--sizes", "64x64x17"],
            "ulysses 80 needs 80 CPU cores, and this machine",
        ),
        (["--parallel", "cfg=2", "defaults.guidance_scale=1"], "cfg 2 needs guidance"),
        (["--parallel", "ulysses=2", "--sizes", "16x16x1"], "1 x 1 x 1 = 1 tokens"),
    ],
)
def test_gangs_that_cannot_be_measured_are_refused_first(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["profile", "--config", str(CONF / "tiny_t2v.yaml"), "--output", str(tmp_path / "profile.json")]
    assert main([*command, *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--sizes", "64x64"], "invalid --sizes=64x64: write 480x832x81,480x832x41\n"),
        (["--steps", "two"], "invalid --steps=two: write 2,4\n"),
    ],
)
def test_a_wrong_flag_of_a_profile_is_named_alone(
    wrong: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--config", str(CONF / "tiny_t2v.yaml"), "--output", str(tmp_path / "p.json"), *wrong]) == 2
    assert capsys.readouterr().err.endswith(says)


def test_a_profile_of_another_model_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_profile(make_profile(), tmp_path / "profile.json")
    given = ["--profile", f"{tmp_path / 'profile.json'},", "--gpus", "2xH200"]
    assert main(["plan", "--config", str(CONF / "tiny_qwen_image.yaml"), *given]) == 0
    words = f"the profile is of {make_profile().model}, and model.path is random:tiny-qwen-image: trust it if"
    assert words in capsys.readouterr().out


@pytest.mark.slow
def test_a_profile_of_the_tiny_model_and_its_gang_is_measured_and_planned_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, yaml, config = tmp_path / "profile.json", tmp_path / "plan.yaml", str(CONF / "tiny_t2v.yaml")
    asked = ["--sizes", "64x64x9", "--repeats", "1", "--steps", "2", "--parallel", "ulysses=2"]
    assert main(["profile", "--config", config, "--output", str(profile), *asked]) == 0
    measured = json.loads(profile.read_text())
    assert [stage["name"] for stage in measured["stages"]] == ["encoder", "transformer", "decoder"]
    assert all(point["compute_s"] == point["turn_s"] > 0 for stage in measured["stages"] for point in stage["points"])
    assert measured["speed"] == "exact" and {"torch", "diffusers"} <= measured["versions"].keys()
    (gang,) = read_profile(profile).gangs
    assert (gang.name, gang.parallel) == ("transformer", ParallelConfig(ulysses=2))
    assert gang.num_heads > 0 and gang.num_blocks > 0
    assert all(point.compute_s > 0 for point in gang.points)
    plan = ["plan", "--config", config, "--profile", str(profile), "--gpus", "3xCPU", "--output", str(yaml)]
    size = ["--height", "64", "--width", "64", "--num-frames", "9", "--aim", "latency"]
    assert main([*plan, *size]) == 0
    said = capsys.readouterr().out
    assert "Best: " in said and "ulysses 2" in said and " * " not in said
    assert sum(stage.num_replicas for stage in load_config(yaml).stages.values()) >= 3
    for wrong in (["--aim", "latency", "--requests=2"], ["--speed", "fast"], ["--height", "63"]):
        assert main([*plan, *wrong]) == 2


@pytest.mark.parametrize(
    ("model", "size", "wrong"), [("flf2v", "64x64x5", "64x64"), ("qwen_image", "64x64", "64x64x5")]
)
def test_a_profile_is_measured_of_what_needs_images_and_of_what_makes_them(
    model: str, size: str, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, config = tmp_path / "profile.json", str(CONF / f"tiny_{model}.yaml")
    command = ["profile", "--config", config, "--output", str(profile), "--repeats", "1", "--steps", "2"]
    assert main([*command, "--sizes", wrong]) == 2
    assert f"invalid --sizes={wrong}" in capsys.readouterr().err
    assert main([*command, "--sizes", size]) == 0
    assert all(point.compute_s > 0 for stage in read_profile(profile).stages for point in stage.points)
    assert main(["plan", "--config", config, "--profile", str(profile), "--gpus", "3xCPU"]) == 0


@pytest.mark.proof
def test_a_decoder_of_several_ranks_is_measured(tmp_path: Path) -> None:
    profile, config = tmp_path / "profile.json", str(CONF / "tiny_t2v.yaml")
    asked = ["--sizes", "64x64x9", "--repeats", "1", "--steps", "2", "--parallel", "rows=2"]
    assert main(["profile", "--config", config, "--output", str(profile), *asked]) == 0
    (gang,) = read_profile(profile).gangs
    assert (gang.name, gang.parallel, gang.denoises) == ("decoder", ROWS, False)
    assert all(point.compute_s > 0 and point.finish_s > 0 for point in gang.points)
