"""Files, bases and overrides become one checked configuration, or one line that says why not."""

import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from disagg_ray import ConfigError, load_config
from disagg_ray.config.load import to_yaml
from disagg_ray.config.model import ModelConfig
from disagg_ray.config.schema import Config, DefaultsConfig, LimitsConfig
from disagg_ray.config.typed import known_keys

CONF = Path(__file__).parent.parent / "conf"
T2V = CONF / "tiny_t2v.yaml"
BASES = {"base.yaml", "tiny.yaml", "wan.yaml"}
LAYOUTS = {"wan21_t2v_1_3b_tiles.yaml"}
"""Models that have a file already, cut otherwise."""
MODELS = sorted({path.name for path in CONF.glob("*.yaml")} - BASES - LAYOUTS)
PUBLISHED = [name for name in MODELS if name.startswith("wan")]


def refusal(path: Path, *overrides: str) -> str:
    """Return the message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@cache
def published(name: str) -> Config:
    return load_config(CONF / name)


def write(folder: Path, name: str = "model.yaml", **layer: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(layer))  # which is YAML too
    return path


@pytest.mark.parametrize("name", MODELS)
def test_every_model_s_file_loads(name: str) -> None:
    config = load_config(CONF / name)
    assert set(config.stages) == {"encoder", "transformer", "decoder"}
    assert (config.defaults.guidance_scale_2 is not None) == ("a14b" in name)


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_shared_file_lacks_only_the_model(name: str) -> None:
    assert refusal(CONF / name).startswith("model.path: not given")
    assert load_config(CONF / name, "model.path=random:tiny-t2v").stages


def test_a_file_of_published_models_is_there_for_each() -> None:
    assert len(PUBLISHED) == 10
    others = {name for name in MODELS if name not in PUBLISHED and not name.startswith("tiny_")}
    images = {"qwen_image.yaml", "qwen_image_edit.yaml", "qwen_image_edit_plus.yaml"}
    unknown = {"hunyuan_video15.yaml", "hunyuan_video15_i2v.yaml", "ltx2.yaml"}
    assert unknown | images <= others
    for name in others - unknown:  # whose commits are not known here
        assert len(bytes.fromhex(published(name).model.revision or "")) == 20


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_pinned_to_a_commit_and_leaves_the_rest_to_its_checkpoint(name: str) -> None:
    model = published(name).model
    assert model.path.startswith("Wan-AI/Wan2.")
    assert model.path.lower().endswith("-diffusers")
    assert model.revision is not None
    assert len(bytes.fromhex(model.revision)) == 20
    assert (model.flow_shift, model.boundary_ratio) == (None, None)
    assert (model.dtype.text_encoder, model.dtype.transformer, model.dtype.vae) == ("bfloat16", "bfloat16", "float32")


def test_published_models_differ_in_repository_and_commit() -> None:
    models = [published(name).model for name in PUBLISHED]
    assert len({model.path for model in models}) == len({model.revision for model in models}) == len(PUBLISHED)


@pytest.mark.parametrize(
    ("name", "task", "size", "steps", "guidance"),
    [
        ("wan21_t2v_1_3b.yaml", "t2v", (480, 832), 50, (5.0, None)),
        ("wan21_t2v_14b.yaml", "t2v", (720, 1280), 50, (5.0, None)),
        ("wan21_i2v_14b_480p.yaml", "i2v", (480, 832), 40, (5.0, None)),
        ("wan21_i2v_14b_720p.yaml", "i2v", (720, 1280), 40, (5.0, None)),
        ("wan21_flf2v_14b_720p.yaml", "flf2v", (720, 1280), 50, (5.0, None)),
        ("wan22_t2v_a14b.yaml", "t2v", (720, 1280), 40, (4.0, 3.0)),
        ("wan22_i2v_a14b.yaml", "i2v", (720, 1280), 40, (3.5, 3.5)),
    ],
)
def test_a_published_model_s_defaults_are_wan_s_own(
    name: str, task: str, size: tuple[int, int], steps: int, guidance: tuple[float, float | None]
) -> None:
    config = published(name)
    defaults = config.defaults
    assert config.model.task == task
    assert (defaults.height, defaults.width) == size
    assert (defaults.num_frames, defaults.fps, defaults.num_inference_steps) == (81, 16, steps)
    assert (defaults.guidance_scale, defaults.guidance_scale_2) == guidance
    assert "最差质量，低质量，JPEG压缩残留" in defaults.negative_prompt


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_fits_on_two_gpus(name: str) -> None:
    stages = published(name).stages
    assert sum(stage.num_gpus * stage.replicas for stage in stages.values()) == 2
    assert {stage.torch_device for stage in stages.values()} == {"cuda"}


def test_base_repeats_no_default_of_the_schema() -> None:
    layer = yaml.safe_load((CONF / "base.yaml").read_text())
    assert set(layer) == {"stages"}
    assert all(set(stage) == {"blocks"} for stage in layer["stages"].values())


def test_every_key_says_what_it_means() -> None:
    keys = list(known_keys(Config))
    assert len(keys) == len(set(keys))
    assert {"model.dtype.vae", "stages.*.blocks", "transport.verify", "cluster.start_timeout_s"} <= set(keys)
    assert {f"defaults.{f.name}" for f in fields(DefaultsConfig)} <= set(keys)


def test_overrides_apply_in_order() -> None:
    config = load_config(T2V, "defaults.fps=10", "limits.max_steps=90", "defaults.fps=12")
    assert (config.defaults.fps, config.limits.max_steps) == (12, 90)


def test_an_override_changes_one_stage_only() -> None:
    stages = load_config(T2V, "stages.transformer.replicas=2").stages
    assert {name: stage.replicas for name, stage in stages.items()} == {"encoder": 1, "transformer": 2, "decoder": 1}


def test_an_override_adds_a_stage() -> None:
    config = load_config(T2V, "stages.eye.blocks=[image_encoder]", "stages.eye.num_gpus=0.5")
    assert config.stages["eye"].blocks == ["image_encoder"]
    assert config.stages["eye"].torch_device == "cuda"
    assert config.max_in_flight == 2 * 4


def test_an_override_may_hold_an_equals_sign() -> None:
    assert load_config(T2V, "defaults.negative_prompt=a=b").defaults.negative_prompt == "a=b"


def test_files_build_on_each_other_from_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, "low.yaml", model={"path": "low"}, stages={"all": {"blocks": ["a"]}}, defaults={"fps": 5})
    write(tmp_path, "inner/middle.yaml", base="../low.yaml", model={"path": "middle"}, limits={"max_steps": 70})
    top = write(tmp_path, "top.yaml", base="inner/middle.yaml", limits={"max_steps": 60})
    config = load_config(top)
    assert (config.model.path, config.defaults.fps, config.limits.max_steps) == ("middle", 5, 60)


@pytest.mark.parametrize("name", ["tiny_i2v.yaml", "wan21_flf2v_14b_720p.yaml", "wan22_t2v_a14b.yaml"])
def test_the_printed_configuration_loads_again_equal(name: str, tmp_path: Path) -> None:
    config = load_config(CONF / name, "transport.pool_bytes=123456", "stages.encoder.num_threads=3")
    printed = tmp_path / "printed.yaml"
    printed.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(printed) == config


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("modl.path=x", "modl", "model"),
        ("model.pth=x", "model.pth", "model.path"),
        ("model.dtype.transfomer=float32", "model.dtype.transfomer", "model.dtype.transformer"),
        ("defaults.guidance=3", "defaults.guidance", "defaults.guidance_scale"),
        ("limit.max_frames=5", "limit", "limits"),
        ("stages.transformer.replica=2", "stages.transformer.replica", "stages.transformer.replicas"),
        ("transport.verfy=true", "transport.verfy", "transport.verify"),
        ("cluster.adress=x", "cluster.adress", "cluster.address"),
        ("max_frames=5", "max_frames", "limits.max_frames"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(override: str, key: str, nearest: str) -> None:
    message = refusal(T2V, override)
    assert message == f"{key}: no such key; did you mean {nearest}?"


def test_a_misspelt_key_in_a_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, base=str(T2V), stages={"encoder": {"blocs": ["text_encoder"]}})
    assert refusal(path) == (f"stages.encoder.blocs: no such key ({path}, line 1); did you mean stages.encoder.blocks?")


def test_a_key_like_no_other_points_to_the_list() -> None:
    assert "disagg-ray config" in refusal(T2V, "zzzzzzzz=1")


@pytest.mark.parametrize(
    ("override", "must"),
    [
        ("stages.transformer.replicas=two", "must be a whole number"),
        ("stages.transformer.replicas=2.5", "must be a whole number"),
        ("stages.transformer.replicas=true", "must be a whole number"),
        ("stages.transformer.blocks=denoise", "must be a list, as [a, b]"),
        ("stages=[encoder]", "must be keys and values"),
        ("stages=3", "must be keys and values"),
        ("model=null", "must be keys and values, as {path: ...}"),
        ("model=", "must be keys and values, as {path: ...}"),
        ("model.dtype=float16", "must be keys and values, as {text_encoder: ...}"),
        ("model.path={a: 1}", "must be text; put it in quotes"),
        ("model.path=${nowhere}", "holds ${...}, which is not replaced by anything; write the value itself"),
        ("model.path=${oc.env:HOME}/x", "holds ${...}, which is not replaced by anything; write the value itself"),
        ("defaults.fps=16.5", "must be a whole number"),
        ("defaults.guidance_scale=5x", "must be a number"),
        ("defaults.negative_prompt=null", 'must be text; write "" for none'),
        ("transport.verify=maybe", "must be true or false"),
        ("transport.pool_bytes=1.5", "must be auto or a number of bytes"),
        ("cluster.start_timeout_s=soon", "must be a number"),
        ("stages.encoder.label_selector=zone", "must be keys and values"),
    ],
)
def test_a_wrong_type_is_refused_by_name(override: str, must: str) -> None:
    key, _, value = override.partition("=")
    message = refusal(T2V, override)
    assert message.startswith(f"invalid {key.removesuffix('.blocks')}")
    assert value in message
    assert message.endswith(f": {must}")


def test_a_place_in_a_list_is_refused_by_name() -> None:
    assert "stages.transformer.blocks[0]=denoise" in refusal(T2V, "stages.transformer.blocks[0]=denoise")


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("model.task=v2v", "'v2v'"),
        ("model.max_sequence_length=0", "0"),
        ("model.flow_shift=0", "0"),
        ("model.flow_shift=.nan", "nan"),
        ("model.flow_shift=.inf", "inf"),
        ("model.boundary_ratio=1.5", "1.5"),
        ("model.boundary_ratio=.nan", "nan"),
        *((f"model.dtype.{f.name}=fp16", "'fp16'") for f in fields(ModelConfig().dtype)),
        *((f"limits.{f.name}=0", "0") for f in fields(LimitsConfig)),
        ("defaults.height=100", "100"),
        ("defaults.width=0", "0"),
        ("defaults.width=-16", "-16"),
        ("defaults.num_frames=8", "8"),
        ("defaults.num_frames=-3", "-3"),
        ("defaults.num_frames=37", "37"),
        ("defaults.num_inference_steps=0", "0"),
        ("defaults.num_inference_steps=101", "101"),
        ("defaults.guidance_scale=.nan", "nan"),
        ("defaults.guidance_scale=-1", "-1"),
        ("defaults.guidance_scale_2=.inf", "inf"),
        ("defaults.fps=0", "0"),
        ("defaults.fps=241", "241"),
        ("stages.encoder.blocks=[]", "[]"),
        ("stages.encoder.replicas=0", "0"),
        ("stages.encoder.num_gpus=-1", "-1"),
        ("stages.encoder.num_gpus=1.5", "1.5"),
        ("stages.encoder.num_gpus=.nan", "nan"),
        ("stages.encoder.num_gpus=.inf", "inf"),
        ("stages.encoder.num_cpus=-1", "-1"),
        ("stages.encoder.num_cpus=.inf", "inf"),
        ("stages.encoder.num_threads=0", "0"),
        ("stages.encoder.dtype=fp16", "'fp16'"),
        ("stages.encoder.device=tpu", "'tpu'"),
        ("stages.encoder.cache_bytes=-1", "-1"),
        ("transport.protocol=udp", "'udp'"),
        ("transport.port_range=15000", "'15000'"),
        ("transport.port_range=20000-10000", "'20000-10000'"),
        ("transport.port_range=80-90", "'80-90'"),
        ("transport.port_range=60000-70000", "'60000-70000'"),
        ("transport.pool_bytes=0", "0"),
        ("transport.pool_bytes=much", "'much'"),
        ("transport.driver_pool_bytes=-1", "-1"),
        ("transport.timeout_s=4", "4"),
        ("transport.timeout_s=.inf", "inf"),
        ("cluster.num_gpus=-1", "-1"),
        ("cluster.start_timeout_s=0", "0"),
        ("cluster.start_timeout_s=.nan", "nan"),
        ("cluster.start_timeout_s=1e8", "100000000.0"),
        ("failures.stall_s=1e9", "1000000000.0"),
        ("failures.shutdown_grace_s=1e7", "10000000.0"),
        ("transport.timeout_s=1e300", "1e+300"),
        ("stages.encoder.replicas=1000000000", "1000000000"),
        ("stages.encoder.num_threads=100000000000", "100000000000"),
        ("stages.encoder.num_cpus=1e30", "1e+30"),
        *((f"limits.{f.name}=1{'0' * 20}", "1" + "0" * 20) for f in fields(LimitsConfig)),
    ],
)
def test_an_impossible_value_is_refused_with_a_remedy(override: str, shown: str) -> None:
    key = override.partition("=")[0]
    start, must, remedy = refusal(T2V, override).partition(": must ")
    assert start.startswith(f"invalid {key}={shown}")
    assert must
    assert remedy


def test_a_default_size_over_the_limit_is_refused() -> None:
    message = refusal(T2V, "defaults.height=2048")
    assert message == "invalid defaults.height x width=131072: must be at most limits.max_pixels=65536"


def test_a_stage_s_name_must_do_for_an_actor() -> None:
    assert refusal(T2V, "stages.my-stage.blocks=[denoise]").startswith(
        "invalid stages.my-stage='my-stage': must be a name"
    )


def test_a_new_stage_needs_blocks() -> None:
    assert refusal(T2V, "stages.extra.replicas=1").startswith("invalid stages.extra.blocks=[]: must name")


def test_no_stage_at_all_is_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, model={"path": "x"})).startswith("invalid stages=[]: must be at least one")


@pytest.mark.parametrize("override", ["transformer", "=3", " =3", ""])
def test_an_override_must_be_key_and_value(override: str) -> None:
    assert refusal(T2V, override).startswith(f"override: {override!r} is not KEY=VALUE")


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert "stages.transformer.blocks=[denoise" in refusal(T2V, "stages.transformer.blocks=[denoise")


@pytest.mark.parametrize("name", ["missing.yaml", ".", "x" * 300 + ".yaml"])
def test_a_missing_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert str(path) in refusal(path)


def test_a_missing_base_is_refused_by_name(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refusal(write(tmp_path, base="nowhere.yaml"))


@pytest.mark.parametrize(
    "content",
    [b"a: [1, 2", b"a: b: c", b"\tkey: 1", b"a: 1\na: 2", b"- a\n- b", b"5", b"\xff\xfe\x00", b"a: ${b"],
    ids=["open list", "two colons", "tab", "twice the same key", "list", "number", "not text", "open interpolation"],
)
def test_a_file_of_something_else_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_files_that_build_on_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", base="b.yaml")
    path = write(tmp_path, "b.yaml", base="a.yaml")
    assert "builds on itself" in refusal(path)


@pytest.mark.parametrize(("num_cpus", "num_threads", "expected"), [(2.5, None, 3), (0.0, None, 1), (4.0, 2, 2)])
def test_threads_follow_cpus_unless_given(num_cpus: float, num_threads: int | None, expected: int) -> None:
    given = "null" if num_threads is None else num_threads
    stage = load_config(T2V, f"stages.encoder.num_cpus={num_cpus}", f"stages.encoder.num_threads={given}")
    assert stage.stages["encoder"].torch_threads == expected


def test_a_stage_s_dtype_overrides_the_component_s() -> None:
    config: Config = load_config(T2V, "model.dtype.transformer=float16", "stages.decoder.dtype=bfloat16")
    assert config.dtype_of("transformer", "transformer_2") == "float16"
    assert config.dtype_of("decoder", "vae") == "bfloat16"
    assert config.dtype_of("encoder", "vae") == "float32"


def test_a_stage_set_to_null_is_left_out() -> None:
    cut = ("stages.encoder=null", "stages.transformer.blocks=[text_encoder,denoise]")
    assert sorted(load_config("conf/tiny_t2v.yaml", *cut).stages) == ["decoder", "transformer"]


def test_fused_is_one_stage_with_all_blocks_and_the_largest_resources() -> None:
    overrides = ("fused=true", "stages.transformer.num_cpus=2", "stages.decoder.replicas=3",
                 "stages.encoder.cache_bytes=100000000")  # fmt: skip
    (stage,) = load_config("conf/tiny_i2v.yaml", *overrides).stages.values()
    assert stage.blocks == ["text_encoder", "image_encoder", "vae_encoder", "denoise", "decode"]
    assert (stage.num_cpus, stage.replicas, stage.torch_threads, stage.cache_bytes) == (2, 3, 2, 100_000_000)


def test_a_relative_model_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    config = Path("conf/tiny_t2v.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    assert load_config(config, "model.path=model").model.path == str(tmp_path / "model")


def test_groups_of_a_stage_take_what_they_do_not_say_from_it() -> None:
    config = load_config(
        "conf/tiny_t2v.yaml",
        "stages.transformer={num_cpus: 2, groups: {fast: {replicas: 2, num_cpus: 4}, slow: {replicas: 3}}}",
    )
    assert config.stages["transformer"].num_replicas == 5
    seen = {group: config.for_group("transformer", group).stages["transformer"] for group in ("fast", "slow")}
    assert {group: (stage.num_cpus, stage.torch_threads) for group, stage in seen.items()} == {
        "fast": (4, 4),
        "slow": (2, 2),
    }
    assert config.for_group("transformer", "slow").max_in_flight == config.max_in_flight == 14


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.encoder.placement=x", "invalid stages.encoder.placement='x': must be one of pack, spread"),
        ("stages.encoder.resources={GPU: 1}", "stages.encoder.resources={'GPU': 1.0}: must be custom resources"),
        ("stages.encoder.resources={disk: 1.5}", "stages.encoder.resources.disk=1.5"),
        ("stages.encoder.accelerator_type=H100", "give the stage num_gpus"),
        ("stages.encoder.groups={a: {replicas: 0}}", "stages.encoder.groups.a.replicas=0"),
        ("stages.encoder.memory=-1", "stages.encoder.memory=-1"),
        ("share_gpu=[encoder]", "must name two stages or more"),
        ("share_gpu=[encoder, painter]", "must be of the stages encoder, transformer, decoder"),
        ("failures.stall_s=0", "failures.stall_s=0.0"),
        ("failures.max_attempts=0", "failures.max_attempts=0"),
        ("failures.timeout_s=-1", "failures.timeout_s=-1.0"),
    ],
)
def test_impossible_deployment_is_refused_by_key(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config("conf/tiny_t2v.yaml", override)


def test_bounds_of_replicas_start_at_the_least_and_size_for_the_most(tmp_path: Path) -> None:
    config = load_config(T2V, "stages.transformer.replicas={min: 2, max: 5}")
    stage = config.stages["transformer"]
    assert (stage.replicas, stage.min_replicas, stage.max_replicas, config.max_in_flight) == (2, 2, 5, 14)
    path = tmp_path / "printed.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert load_config(path, "stages.transformer.replicas=3").stages["transformer"].max_replicas is None


@pytest.mark.parametrize("bounds", ["{min: 3, max: 2}", "{min: 0, max: 2}", "{min: 1}", "{least: 1, most: 2}"])
def test_impossible_bounds_of_replicas_are_refused(bounds: str) -> None:
    assert "stages.transformer.replicas" in refusal(T2V, f"stages.transformer.replicas={bounds}")


def test_stages_that_share_a_gpu_must_fit_one_and_be_alike() -> None:
    gpus = ("stages.encoder.num_gpus=0.6", "stages.decoder.num_gpus=0.6", "share_gpu=[encoder, decoder]")
    with pytest.raises(ConfigError, match=r"add up to 1\.2"):
        load_config("conf/tiny_t2v.yaml", *gpus)
    with pytest.raises(ConfigError, match="same number of replicas"):
        load_config("conf/tiny_t2v.yaml", "stages.encoder.replicas=2", "share_gpu=[encoder, decoder]")


def test_fusing_leaves_no_gpu_to_share() -> None:
    whole = (f"stages.{stage}.num_gpus=1" for stage in ("encoder", "transformer", "decoder"))
    config = load_config("conf/wan21_t2v_1_3b.yaml", "fused=true", *whole)
    assert config.share_gpu == []
    assert config.stages["fused"].num_gpus == 1


GPUS = ("stages.encoder.num_gpus=0.5", "stages.decoder.num_gpus=0.5", "share_gpu=[encoder, decoder]")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((*GPUS, "stages.decoder.placement=spread"), "invalid stages.decoder.placement='spread': must be pack"),
        (
            (*GPUS, "stages.encoder.accelerator_type=A", "stages.decoder.accelerator_type=B"),
            "must be as stages.encoder",
        ),
        (
            (*GPUS, "stages.encoder.label_selector.z=a", "stages.decoder.label_selector.z=b"),
            "must be as stages.encoder",
        ),
        (
            ("stages.encoder.num_gpus=4",),
            "must be from 0 to 1: a replica computes on one GPU; write replicas=4 for that",
        ),
        (("stages.decoder.cache_bytes=5",), "must be left out: it is for the stage with the block text_encoder"),
    ],
)
def test_what_would_do_nothing_is_refused(overrides: tuple[str, ...], said: str) -> None:
    assert said in refusal(T2V, *overrides)


def test_fusing_keeps_what_agrees_and_adds_up_memory() -> None:
    every = [f"stages.{stage}.{key}" for stage in ("encoder", "transformer", "decoder")
             for key in ("device=cpu", "memory=1000", "dtype=float16")]  # fmt: skip
    more = ("stages.encoder.resources.disk=1", "stages.decoder.resources.disk=2", "stages.transformer.placement=spread",
            "stages.encoder.label_selector.zone=a", "stages.transformer.replicas={min: 1, max: 3}")  # fmt: skip
    fused = load_config(T2V, "fused=true", "stages.transformer.num_gpus=1", *every, *more).stages["fused"]
    assert (fused.torch_device, fused.memory, fused.dtype, fused.placement) == ("cpu", 3000, "float16", "spread")
    assert (fused.resources, fused.label_selector) == ({"disk": 2}, {"zone": "a"})
    assert (fused.least_replicas, fused.most_replicas) == (1, 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("encoder.label_selector.zone=a", "decoder.label_selector.zone=b"),
        ("encoder.device=cpu", "transformer.device=cuda"),
        ("transformer.dtype=float16", "decoder.dtype=bfloat16"),
        ("transformer.vae.channels_last=true", "decoder.vae.tile_pixels=5"),
    ],
)
def test_fusing_refuses_what_one_stage_cannot_have_and_names_both(one: str, other: str) -> None:
    said = refusal(T2V, "fused=true", f"stages.{one}", f"stages.{other}")
    assert said.startswith("invalid fused=true: stages.")
    assert " and stages." in said
    assert "cannot go into one stage; write" in said


def test_fusing_keeps_groups_each_with_what_the_other_stages_need() -> None:
    groups = "stages.transformer.groups={fast: {replicas: 2, num_gpus: 1, num_cpus: 1}, slow: {num_gpus: 0.5}}"
    fused = load_config(T2V, "fused=true", "stages.encoder.num_cpus=4", groups).stages["fused"]
    assert {name: (g.replicas, g.num_gpus, g.num_cpus) for name, g in fused.replica_groups.items()} == {
        "fast": (2, 1, 4),
        "slow": (1, 0.5, 4),
    }
