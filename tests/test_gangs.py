"""Replicas of several ranks: their configuration, their placement, and the videos that they make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import wait_until

from disagg_ray import ConfigError, Pipeline, Request, RequestError, load_config
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.local import LocalPipeline
from disagg_ray.request import check

CONF = Path(__file__).parent.parent / "conf"
T2V = CONF / "tiny_t2v.yaml"
T, D = "stages.transformer", "stages.decoder"
SHARDED = f"{T}.parallel={{cfg: 2, shard_weights: true}}"


def test_the_ranks_of_a_replica_are_configured() -> None:
    parallel = "{cfg: 2, ulysses: 2, ring: 1, shard_weights: false, spread: true}"
    stage = load_config(T2V, f"{T}.parallel={parallel}").stages["transformer"]
    assert stage.parallel == ParallelConfig(cfg=2, ulysses=2, spread=True)
    assert stage.parallel.size == 4


def test_a_group_of_plain_replicas_goes_beside_a_group_of_gangs() -> None:
    groups = f"{T}.groups={{one: {{parallel: {{cfg: 1}}}}, four: {{num_cpus: 2}}, two: {{parallel: {{ulysses: 2}}}}}}"
    stage = load_config(T2V, f"{T}.parallel.cfg=2", f"{T}.parallel.ulysses=2", groups).stages["transformer"]
    assert {name: group.parallel.size for name, group in stage.replica_groups.items()} == {
        "one": 1,
        "four": 4,
        "two": 2,
    }


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((f"{T}.parallel.cfg=3",), f"invalid {T}.parallel.cfg=3: must be from 1 to 2"),
        ((f"{T}.parallel.ulysses=0",), f"invalid {T}.parallel.ulysses=0: must be at least 1"),
        ((f"{T}.parallel.spread=true",), f"invalid {T}.parallel.spread=true: must be false: a replica of one rank"),
        ((f"{T}.parallel.shard_weights=true",), "must be false: a replica of one rank"),
        ((f"{T}.parallel.ulysses=2", f"{T}.denoiser.step_cache.method=first_block"), "must be mag, taylorseer or none"),
        ((SHARDED, f"{T}.denoiser.step_cache.method=taylorseer"), "and none with parallel.shard_weights"),
        ((f"{T}.parallel.cfg=2", f"{T}.denoiser.quantization=fp8"), "must be none or fp8_storage with parallel"),
        ((SHARDED, f"{T}.denoiser.quantization=fp8_storage"), "and none with shard_weights"),
        ((f"{T}.parallel.ring=2",), f"invalid {T}.parallel.ring=2: must be 1: no attention backend"),
        ((f"{T}.parallel.cfg=2", "fused=true"), "only a stage of the block denoise alone"),
        ((f"{T}.parallel.cfg=2", f"{T}.num_gpus=0.5"), "with num_gpus=0.5: no two ranks may share a GPU"),
        ((f"{T}.parallel.cfg=2", f"{T}.num_gpus=1", f"{T}.offload=group"), "must be left out with offload=group"),
        ((f"{T}.parallel.cfg=2", f"{T}.placement=spread"), "write parallel.spread"),
        (("stages.encoder.parallel.ulysses=2",), "only a stage of the block denoise alone"),
        (("stages.decoder.parallel.cfg=2",), "only a stage of the block denoise alone"),
        ((f"{T}.parallel.rows=2",), f"invalid {T}.parallel.rows=2: must be 1: only a stage of the block decode alone"),
        ((f"{D}.parallel.rows=2", f"{D}.vae.tile_pixels=0"), f"invalid {D}.vae.tile_pixels=0: must be null with"),
        ((f"{D}.parallel.rows=9", "defaults.height=64"), "makes 8 rows of latents, fewer than the 9 ranks"),
        ((f"{T}.parallel.cfg=2", "share_gpu=[transformer, decoder]"), "must leave transformer out: its ranks"),
    ],
)
def test_what_a_gang_cannot_be_is_refused_by_name(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(T2V, *overrides)


def test_a_size_whose_tokens_do_not_divide_is_refused_before_it_is_queued() -> None:
    config = load_config(T2V, f"{T}.parallel.ulysses=2")
    says = r"invalid height x width x num_frames='16x48x1': makes 1 x 1 x 3 = 3 tokens .* by the 2 ranks"
    with pytest.raises(RequestError, match=says):
        check(Request("a red circle", height=16, width=48, num_frames=1), config)


def test_a_pipeline_in_one_process_refuses_ranks() -> None:
    with pytest.raises(ConfigError, match=r"stages.transformer.parallel: a pipeline in one process has no ranks"):
        LocalPipeline.from_config(T2V, f"{T}.parallel.cfg=2")


TWO = (f"{T}.parallel.ulysses=2", f"{T}.num_threads=1")


@pytest.mark.slow
def test_two_ranks_make_the_video_of_one(cluster: None) -> None:
    request = Request("a red circle", seed=5, height=32, width=32, num_frames=5, num_inference_steps=2)
    with Pipeline.from_config(T2V, *TWO) as pipeline:
        (gang,) = (replica for replica in pipeline.replicas if replica.ranks)
        assert [(rank.rank, rank.host, rank.gpu) for rank in gang.ranks] == [(0, gang.host, ""), (1, gang.host, "")]
        result = pipeline.generate(request)
        assert result.data == LocalPipeline.from_config(T2V).generate(request).data
        assert [timing.num_ranks for timing in result.stages] == [1, 2, 1]
        wait_until(lambda: set(pipeline.health()) == {r.name for r in pipeline.replicas}, "a replica is silent", 240)
        assert {name: len(health.memory) for name, health in pipeline.health().items()}[gang.name] == 2
