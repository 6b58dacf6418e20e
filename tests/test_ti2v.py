"""Wan 2.2 TI2V: one checkpoint makes stock's frames of text alone and of a first frame."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import wait_until_empty
from PIL import Image
from safetensors.torch import save_file
from splits import ONE, THREE, Load, Split
from test_lora import TO_Q, factors

from disagg_ray import ConfigError, LocalPipeline, Pipeline, Request, RequestError, load_config
from disagg_ray.config.schema import Config
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.planning.profiling import measure_profile
from disagg_ray.request import resolve

CONF = Path(__file__).parents[1] / "conf"
SMALL = ("model.max_sequence_length=64", "limits.max_pixels=9216", "limits.max_frames=9")
PLAIN: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "blurry", "height": 64, "width": 96, "num_frames": 5,
    "num_inference_steps": 3, "guidance_scale": 5.0,
}  # fmt: skip
UNGUIDED: dict[str, Any] = {"guidance_scale": 1.0, "height": 96, "width": 64, "num_frames": 9, "prompt": "two"}
CASES = [(text, image) for text in ({}, UNGUIDED) for image in (None, (190, 130))]
NAMES = ["text, guided", "image, guided", "text, unguided", "image, unguided"]

DENOISER = "stages.transformer.denoiser"
CACHES: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
    "first_block": (("method=first_block", "threshold=10"), lambda: diffusers.FirstBlockCacheConfig(10)),
    "mag": (
        ("method=mag", "ratios=[1,1,1,1,1,1]"),
        lambda: diffusers.MagCacheConfig(num_inference_steps=6, mag_ratios=[1.0] * 6),
    ),
    "taylorseer": (
        ("method=taylorseer", "interval=2"),
        lambda: diffusers.TaylorSeerCacheConfig(2, use_lite_mode=True),
    ),
}
"""Overrides, and the same of diffusers."""
SIZES = [(100, 100), (200, 100), (32, 999)]
"""Of images, (width, height)."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configure(checkpoint: Callable[[str], Path]) -> Callable[..., Config]:
    """Give the tiny model's configuration with some overrides."""
    model = f"model.path={checkpoint('tiny-ti2v')}"
    return lambda *overrides: load_config(CONF / "tiny_ti2v.yaml", model, *SMALL, *overrides)


@pytest.fixture(scope="module")
def arguments(image: Callable[..., Image.Image]) -> Callable[..., dict[str, Any]]:
    """Give a request's arguments; the image is (width, height)."""

    def make(case: dict[str, Any], size: tuple[int, int] | None) -> dict[str, Any]:
        return PLAIN | case | ({"image": image(*size)} if size else {})

    return make


class Stock:
    """The two stock pipelines, which share the components of one checkpoint."""

    def __init__(self, folder: Path, dtype: dict[str, torch.dtype]) -> None:
        self.text = diffusers.WanPipeline.from_pretrained(folder, dtype=dtype)
        self.image = diffusers.WanImageToVideoPipeline(**self.text.components, expand_timesteps=True)
        for pipeline in (self.text, self.image):
            pipeline.set_progress_bar_config(disable=True)

    def frames(self, **asked: Any) -> np.ndarray:
        pipeline = self.image if "image" in asked else self.text
        generator = torch.Generator("cpu").manual_seed(7)
        made: np.ndarray = pipeline(**asked, generator=generator, max_sequence_length=64).frames[0]
        return made


@pytest.fixture(scope="module")
def stock(checkpoint: Callable[[str], Path]) -> Stock:
    """Give the stock pipelines in float32."""
    return Stock(checkpoint("tiny-ti2v"), {"default": torch.float32})


def ask(**asked: Any) -> Request:
    return Request(**asked, seed=7, format="npy")


@pytest.mark.parametrize(("case", "size"), CASES, ids=NAMES)
@pytest.mark.parametrize("cut", [THREE, ONE])
def test_replicas_equal_stock(
    splits: Load[Split], arguments: Any, stock: Stock, cut: str, case: dict[str, Any], size: tuple[int, int] | None
) -> None:
    asked, split = arguments(case, size), splits(cut)
    assert np.array_equal(split.generate(ask(**asked)), stock.frames(**asked))
    assert split.bytes_in_use() == {}


@pytest.mark.parametrize("halves", [("text_encoder", "transformer"), ("text_encoder", "transformer", "vae")])
@pytest.mark.parametrize("size", [None, (190, 130)], ids=["text", "image"])
def test_bfloat16_equals_stock(
    configure: Callable[..., Config],
    checkpoint: Callable[[str], Path],
    arguments: Any,
    size: tuple[int, int] | None,
    halves: tuple[str, ...],
) -> None:
    asked = arguments({}, size)
    with LocalPipeline(configure(*(f"model.dtype.{name}=bfloat16" for name in halves))) as pipeline:
        made = pipeline.generate(ask(**asked)).frames
    dtypes = dict.fromkeys(halves, torch.bfloat16) | {"default": torch.float32}
    assert np.array_equal(made, Stock(checkpoint("tiny-ti2v"), dtypes).frames(**asked))


def test_a_lora_changes_frames_as_stock_s(
    configure: Callable[..., Config], checkpoint: Callable[[str], Path], arguments: Any, stock: Stock, tmp_path: Path
) -> None:
    asked = arguments({}, (190, 130))
    save_file(factors(TO_Q), tmp_path / "lora.safetensors")
    with LocalPipeline(configure(f"{DENOISER}.loras=[{{path: {tmp_path / 'lora.safetensors'}}}]")) as pipeline:
        made = pipeline.generate(ask(**asked)).frames
    other = Stock(checkpoint("tiny-ti2v"), {"default": torch.float32})
    other.image.load_lora_weights(factors(TO_Q))
    assert np.array_equal(made, other.frames(**asked))
    assert not np.array_equal(made, stock.frames(**asked))


@pytest.mark.parametrize("method", CACHES)
def test_step_caches_equal_stock_s(configure: Callable[..., Config], arguments: Any, stock: Stock, method: str) -> None:
    overrides, from_diffusers = CACHES[method]
    asked = [arguments({"num_inference_steps": 6}, size) for size in (None, (190, 130))]
    plain = stock.frames(**asked[0])
    with LocalPipeline(configure(*(f"{DENOISER}.step_cache.{each}" for each in overrides))) as pipeline:
        made = [pipeline.generate(ask(**each)).frames for each in asked]
    for frames, each in zip(made, asked, strict=True):
        stock.text.transformer.enable_cache(from_diffusers())
        expected = stock.frames(**each)
        stock.text.transformer.disable_cache()
        assert np.array_equal(frames, expected)
    assert not np.array_equal(made[0], plain)


def test_tiles_of_encoder_and_decoder_equal_stock_s(
    configure: Callable[..., Config], arguments: Any, stock: Stock
) -> None:
    """The encoder's tiles are of 256 x 256 patches of 2 x 2 pixels, the decoder's of 256 x 256 pixels."""
    shares = [f"stages.decoder_{k}.blocks=[decode.{k}of2]" for k in (1, 2)]
    cut = ("stages.decoder=null", *shares, "stages.join.blocks=[blend]", "stages.encoder.vae.tile_pixels=0")
    asked = arguments({"height": 32, "width": 544, "num_inference_steps": 1}, (190, 130))
    plain = stock.frames(**asked)
    stock.text.vae.enable_tiling()
    expected = stock.frames(**asked)
    stock.text.vae.use_tiling = False
    with LocalPipeline(configure("limits.max_pixels=17408", *cut)) as pipeline:
        assert np.array_equal(pipeline.generate(ask(**asked)).frames, expected)
    assert not np.array_equal(expected, plain)


def test_every_stage_warms_up_and_other_options_only_round(
    configure: Callable[..., Config], arguments: Any, stock: Stock
) -> None:
    asked = arguments({}, (190, 130))
    warm = [f"stages.{stage}.warm_up=[[64,96,5]]" for stage in ("encoder", "transformer", "decoder")]
    fast = (f"{DENOISER}.fuse=true", f"{DENOISER}.attention=auto", "stages.decoder.vae.channels_last=true")
    with LocalPipeline(configure(*warm, *fast)) as pipeline:
        made = pipeline.generate(ask(**asked)).frames
    assert np.abs(made - stock.frames(**asked)).max() < 1e-4


@pytest.mark.proof
def test_a_pipeline_on_ray_takes_requests_with_and_without_an_image(
    cluster: None, configure: Callable[..., Config], arguments: Any, stock: Stock
) -> None:
    asked = [arguments({}, size) for size in (None, (190, 130), None)]
    with Pipeline(configure()) as pipeline:
        handles = [pipeline.submit(ask(**each)) for each in asked]
        for each, handle in zip(asked, handles, strict=True):
            assert np.array_equal(handle.result(240).frames, stock.frames(**each))
        wait_until_empty(pipeline, 30.0)


def test_stages_are_profiled_by_text_alone(configure: Callable[..., Config], arguments: Any) -> None:
    profile = measure_profile(configure(), [ask(**arguments({}, None))], repeats=1)
    assert [stage.name for stage in profile.stages] == ["encoder", "transformer", "decoder"]


def test_sizes_of_the_published_model(configure: Callable[..., Config]) -> None:
    defaults = load_config(CONF / "wan22_ti2v_5b.yaml").defaults
    geometry = open_checkpoint(configure().model).geometry  # alike in all that counts here
    assert (defaults.height, defaults.width, defaults.num_frames, defaults.fps) == (704, 1280, 121, 24)
    assert geometry.latents_shape(704, 1280, 121) == (1, 48, 31, 44, 80)
    sizes = geometry.tensor_bytes(704 * 1280, 121, 100)
    assert sizes["latents"] == 4 * 48 * 31 * 44 * 80
    assert sizes["image_latents"] == 4 * 48 * 44 * 80
    assert sizes["image"] == 300


def test_a_size_left_out_follows_the_image_in_multiples_of_32(
    configure: Callable[..., Config], image: Callable[..., Image.Image]
) -> None:
    config = configure("defaults.height=96", "defaults.width=96")
    sizes = [(r.height, r.width) for r, _ in (resolve(ask(prompt="a", image=image(*s)), config) for s in SIZES)]
    assert sizes == [(96, 96), (64, 128), (288, 32)]


@pytest.mark.parametrize(
    ("asked", "overrides", "says"),
    [
        ({"height": 48}, (), "invalid height=48: must be a positive multiple of 32; the nearest is 64"),
        ({"width": 50}, (), "invalid width=50: must be a positive multiple of 32; the nearest is 64"),
        ({"last_image": (64, 64)}, (), "last_image: given, but a model of task ti2v takes none"),
        ({"image": (64, 64)}, ("stages.encoder.blocks=[text_encoder]",), "image: given, but no stage has the block"),
        ({"guidance_scale_2": 2.0}, (), "guidance_scale_2=2.0: must be left out"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_name(
    configure: Callable[..., Config], image: Callable[..., Image.Image], asked: Any, overrides: Any, says: str
) -> None:
    asked = {name: image(*value) if "image" in name else value for name, value in asked.items()}
    with pytest.raises(RequestError, match=re.escape(says)):
        resolve(ask(prompt="a", **asked), configure(*overrides))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("defaults.width=48", "invalid defaults.width=48: must be a positive multiple of 32"),
        ("stages.decoder.warm_up=[[64,48,5]]", "invalid stages.decoder.warm_up=48: must be a positive multiple of 32"),
        (f"{DENOISER}.step_cache.method=sea", f"{DENOISER}.step_cache.method='sea': is not for model.task=ti2v"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(
    configure: Callable[..., Config], override: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        configure(override)


def test_a_stage_without_an_image_encoder_still_makes_videos_of_text(
    configure: Callable[..., Config], arguments: Any, stock: Stock
) -> None:
    asked = arguments({}, None)
    with LocalPipeline(configure("stages.encoder.blocks=[text_encoder]")) as pipeline:
        assert np.array_equal(pipeline.generate(ask(**asked)).frames, stock.frames(**asked))
