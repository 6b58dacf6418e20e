"""A decode whose tiles several stages share equals one tiled decode bit for bit, diffusers' own included."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from diffusers.video_processor import VideoProcessor
from faulty import faulty_replicas
from helpers import offload, wait_until
from hypothesis import given
from hypothesis import strategies as st
from splits import HOST, Split

from disagg_ray import ConfigError, LocalPipeline, Pipeline, Request, load_config
from disagg_ray.config.schema import Config
from disagg_ray.config.transport import TransportConfig
from disagg_ray.errors import PlanError
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.wan.tiles import Blend, DecodePart, _Shares
from disagg_ray.planning.profiling import measure_profile
from disagg_ray.transfer.pool import Pool

CONF = Path(__file__).parents[1] / "conf"
LARGE, WIDE, SMALL = (208, 272), (16, 272), (16, 32)
"""(height, width) that make four tiles, two, and none at all."""
LIMITS = ("limits.max_pixels=57000", "limits.max_frames=5", "defaults.num_frames=5", "defaults.num_inference_steps=1")
ONE = ("stages.decoder.vae.tile_pixels=0",)


def parts(number: int) -> tuple[str, ...]:
    """Return the overrides that cut the decode."""
    shares = [f"stages.decoder_{k}.blocks=[decode.{k}of{number}]" for k in range(1, number + 1)]
    return ("stages.decoder=null", *shares, "stages.join.blocks=[blend]")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configure(checkpoint: Callable[[str], Path]) -> Callable[..., Config]:
    """Give a tiny model's configuration with some overrides."""
    model = f"model.path={checkpoint('tiny-t2v')}"
    return lambda *overrides: load_config(CONF / "tiny_t2v.yaml", model, *LIMITS, *overrides)


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> Callable[..., np.ndarray]:
    """Give the frames of the stock pipeline with tiling."""
    pipeline = diffusers.WanPipeline.from_pretrained(checkpoint("tiny-t2v"), dtype={"default": torch.float32})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_tiling()

    @cache
    def run(height: int, width: int) -> np.ndarray:
        made: np.ndarray = pipeline(
            "a red circle", negative_prompt="", height=height, width=width, num_frames=5, num_inference_steps=1,
            guidance_scale=2.0, max_sequence_length=32, generator=torch.Generator("cpu").manual_seed(7),
        ).frames[0]  # fmt: skip
        return made

    return run


@pytest.fixture(scope="module")
def split(configure: Callable[..., Config]) -> Iterator[Split]:
    """Give the stages of a decode in two parts, which hand their tensors over with Mooncake."""
    pool = Pool("driver", 2**23, HOST, TransportConfig())
    split = Split(configure(*parts(2)), pool)
    yield split
    for each in (*split.replicas.values(), pool):
        each.close()


def ask(size: tuple[int, int], **more: Any) -> Request:
    return Request("a red circle", seed=7, height=size[0], width=size[1], format="npy", **more)


@pytest.mark.parametrize(
    ("cut", "sizes"),
    [(ONE, (WIDE,)), (parts(3), (LARGE, WIDE, SMALL)), ((*parts(2), "fused=true"), (WIDE,))],
    ids=["one decoder", "more parts than tiles", "fused"],
)
def test_parts_make_stock_s_tiled_frames(
    configure: Callable[..., Config],
    expected: Callable[..., np.ndarray],
    cut: tuple[str, ...],
    sizes: tuple[tuple[int, int], ...],
) -> None:
    pipeline = LocalPipeline(configure(*cut))
    for size in sizes:
        assert np.array_equal(pipeline.generate(ask(size)).frames, expected(*size)), size


@pytest.mark.parametrize("size", [LARGE, SMALL])
def test_tiles_travel_unchanged(split: Split, expected: Callable[..., np.ndarray], size: tuple[int, int]) -> None:
    assert np.array_equal(split.generate(ask(size)), expected(*size))
    assert split.bytes_in_use() == {}


def test_both_parts_have_work(split: Split) -> None:
    job = split.submit(ask(WIDE))
    for stage in split.graph.order:
        split.run(job, stage)
    sizes = [job.replies[f"decoder_{k}"].handoff.nbytes for k in (1, 2)]
    split.release(job)
    assert sizes == [4 * 3 * 5 * 16 * width for width in (256, 80)]


def test_the_join_holds_no_weights(split: Split) -> None:
    assert {stage: sorted(replica.stage.weights) for stage, replica in split.replicas.items()} == {
        "encoder": ["text_encoder"], "transformer": ["transformer"], "decoder_1": ["vae"], "decoder_2": ["vae"],
        "join": [],
    }  # fmt: skip


def test_every_part_warms_up(configure: Callable[..., Config], expected: Callable[..., np.ndarray]) -> None:
    stages = ("decoder_1", "decoder_2", "join")
    warm = [f"stages.{stage}.warm_up=[[{WIDE[0]},{WIDE[1]},5]]" for stage in stages]
    pipeline = LocalPipeline(configure(*parts(2), *warm))
    offload(next(stage for stage in pipeline.stages if stage.name == "decoder_1"), "model")
    assert np.array_equal(pipeline.generate(ask(WIDE)).frames, expected(*WIDE))


@pytest.mark.parametrize("size", [(13, 17), (4, 4)], ids=["tiles", "none"])
def test_a_vae_with_patches_is_shared_alike(tmp_path: Path, size: tuple[int, int]) -> None:
    """Wan 2.2's: it makes patches of 2 x 2 pixels of latents that span 16."""
    torch.manual_seed(0)
    kind = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1, **kind).eval()
    vae.save_config(tmp_path)
    components = SimpleNamespace(vae=vae, video_processor=VideoProcessor(vae_scale_factor=8))
    state = PipelineState()
    for name, value in {"height": 16 * size[0], "width": 16 * size[1], "num_frames": 5}.items():
        state.set(name, value)
    state.set("latents", torch.randn(1, 16, 2, *size))
    for block in (DecodePart(1, 2), DecodePart(2, 2), Blend(2, tmp_path)):
        block(components, state)
    made = state.get("videos")
    vae.enable_tiling()
    WanVaeDecoderStep()(components, state)
    assert made.shape == (1, 5, 16 * size[0], 16 * size[1], 3)
    assert np.array_equal(made, state.get("videos"))


GEOMETRY = open_checkpoint(load_config(CONF / "tiny_t2v.yaml").model).geometry


@given(st.integers(1, 120), st.integers(1, 120), st.integers(2, 9))
def test_no_part_s_tiles_are_larger_than_their_slot(height: int, width: int, num_parts: int) -> None:
    """Sizes are in latents of 8 x 8 pixels."""
    shares, pixels = _Shares(num_parts), [0] * num_parts
    step = 24 if max(height, width) > 32 else 32
    for top in range(0, height, step):
        for left in range(0, width, step):
            tile = torch.empty(min(32, height - top), min(32, width - left), device="meta")
            pixels[shares.owner(tile, first=True)] += 64 * tile.numel()
    slots = GEOMETRY.tensor_bytes(64 * height * width, 9, 0, num_parts)
    assert max(pixels) * 3 * 9 * 4 <= slots["tiles_1"] == slots[f"tiles_{num_parts}"]


BLENDED = "stages.join.blocks=[blend]"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("stages.decoder.blocks=[decode.1of2]", BLENDED),
            "must be decode alone, or decode.1of2, decode.2of2 and blend",
        ),
        (("stages.decoder.blocks=[decode.1of2,decode.2of2]",), "and blend, each once"),
        ((*parts(2), "stages.other.blocks=[decode.2of2]"), "each once"),
        ((*parts(2), "stages.other.blocks=[decode.2of3]"), "decode.3of3 and blend, each once"),
        ((*parts(2), "stages.other.blocks=[decode]"), "must be decode alone"),
        ((*parts(2), "stages.decoder_2.blocks=[decode.two]"), "must be decode alone"),
        ((BLENDED,), r"invalid stages=\['blend', 'decode'\]: must be decode alone"),
        ((*parts(2), "stages.join=null", "stages.decoder_1.blocks=[decode.1of2,blend]"), "a stage of its own"),
        (
            (*parts(2), "stages.decoder_1.vae.tile_pixels=0"),
            "decoder_1.vae.tile_pixels=0: must be left out: .* always works in tiles",
        ),
    ],
)
def test_parts_that_make_no_whole_are_refused_before_anything_starts(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(CONF / "tiny_t2v.yaml", *overrides)


def test_the_example_puts_five_stages_on_three_gpus() -> None:
    config = load_config(CONF / "wan21_t2v_1_3b_tiles.yaml")
    assert set(config.stages) == {"encoder", "transformer", "decoder_1", "decoder_2", "join"}
    assert sum(stage.num_gpus for stage in config.stages.values()) == 3
    assert config.num_parts == 2


def test_parts_cannot_be_profiled(configure: Callable[..., Config]) -> None:
    with pytest.raises(PlanError, match="write decode in place of its parts"):
        measure_profile(configure(*parts(2)), [])


@pytest.mark.proof
def test_a_dead_part_or_join_costs_itself_and_latents_are_enough(
    cluster: None, configure: Callable[..., Config], expected: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    config = configure(*parts(2), "stages.encoder=null", "stages.transformer.blocks=[text_encoder,denoise]")
    made, latents = expected(*LARGE), tmp_path / "latents"
    with faulty_replicas(tmp_path) as faults, Pipeline(config) as pipeline:
        for stage, point in (("decoder_2", "publish"), ("join", "publish"), ("decoder_1", "pull")):
            faults.set(f"{stage}.{point}", "die")
            kept = latents if stage == "join" else None
            result = pipeline.submit(ask(LARGE, id=stage), latents_file=kept).result(180)
            assert np.array_equal(result.frames, made)
            charged = dict.fromkeys(config.stages, 1) | (
                {stage: 2} if point == "publish" else {}
            )  # a pull costs nothing
            assert {timing.stage: timing.attempts for timing in result.stages} == charged
            wait_until(lambda name=stage: pipeline.num_restarts[name] == 1, "it was not replaced", 60.0)
        again = pipeline.submit(ask(LARGE, id="join"), latents_file=latents).result(180)
        assert np.array_equal(again.frames, made)
        assert {timing.stage for timing in again.stages} == {"decoder_1", "decoder_2", "join"}
        assert pipeline.driver_bytes_in_use == 0
