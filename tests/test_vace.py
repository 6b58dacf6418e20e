"""Wan 2.1 VACE makes stock's frames of a text, a control video, its mask and reference images, of any of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import copy_changed, wait_until_empty
from PIL import Image
from safetensors.torch import save_file
from splits import ONE, THREE, Load, Split
from test_lora import TO_Q, factors

from disagg_ray import CheckpointError, ConfigError, LocalPipeline, Pipeline, Request, load_config
from disagg_ray.config.schema import Config
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.preflight import check_model
from disagg_ray.planning.profiling import measure_profile

DENOISER = "stages.transformer.denoiser"
CONF = Path(__file__).parents[1] / "conf"
SMALL = ("model.max_sequence_length=64", "limits.max_pixels=9216", "limits.max_frames=9")
PLAIN: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "blurry", "height": 64, "width": 96, "num_frames": 5,
    "num_inference_steps": 3, "guidance_scale": 5.0,
}  # fmt: skip
UNGUIDED: dict[str, Any] = {"guidance_scale": 1.0, "num_frames": 9, "prompt": "two", "num_inference_steps": 2}
CASES = {
    "text": (),
    "video": ("video",),
    "video and mask": ("video", "mask"),
    "references": ("reference_images",),
    "all": ("video", "mask", "reference_images"),
}
"""Fields of inputs that are given."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configure(checkpoint: Callable[[str], Path]) -> Callable[..., Config]:
    """Give the tiny model's configuration with some overrides."""
    model = f"model.path={checkpoint('tiny-vace')}"
    return lambda *overrides: load_config(CONF / "tiny_vace.yaml", model, *SMALL, *overrides)


def write_frames(folder: Path, frames: list[Image.Image]) -> Path:
    """Write frames as a folder of files."""
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def images(image: Callable[..., Image.Image]) -> dict[str, list[Image.Image]]:
    """Give seven frames, their masks and two references, of several sizes."""
    squares = [Image.new("L", (192, 128)) for _ in range(7)]
    for number, square in enumerate(squares):
        square.paste(255, (10 + 9 * number, 20, 90 + 9 * number, 100))
    return {
        "video": [image(192, 128, seed) for seed in range(7)],
        "mask": squares,
        "reference_images": [image(90, 130, 11), image(200, 60, 12)],
    }


@pytest.fixture(scope="module")
def files(images: dict[str, list[Image.Image]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Give the same as files."""
    folder = tmp_path_factory.mktemp("inputs")
    references = sorted(write_frames(folder / "references", images["reference_images"]).iterdir())
    clips = {name: write_frames(folder / name, images[name]) for name in ("video", "mask")}
    return {**clips, "reference_images": [str(path) for path in references]}


class Stock:
    """The stock pipeline."""

    def __init__(self, folder: Path, images: dict[str, list[Image.Image]], dtype: Any = torch.float32) -> None:
        self.pipeline = diffusers.WanVACEPipeline.from_pretrained(folder, dtype=dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        self._images = images

    def frames(self, given: tuple[str, ...] = (), **asked: Any) -> np.ndarray:
        inputs = {name: self._images[name] for name in given}
        clips = {name: inputs[name][: asked["num_frames"]] for name in ("video", "mask") if name in inputs}
        generator = torch.Generator("cpu").manual_seed(7)
        made: np.ndarray = self.pipeline(**inputs | clips | asked, generator=generator, max_sequence_length=64).frames[
            0
        ]
        return made


@pytest.fixture(scope="module")
def stock(checkpoint: Callable[[str], Path], images: dict[str, list[Image.Image]]) -> Stock:
    return Stock(checkpoint("tiny-vace"), images)


@pytest.fixture(scope="module")
def ask(files: dict[str, Any]) -> Callable[..., Request]:
    """Give a request with some of the inputs."""

    def make(given: tuple[str, ...] = (), **asked: Any) -> Request:
        return Request(**{name: files[name] for name in given} | PLAIN | asked, seed=7, format="npy")

    return make


@pytest.mark.parametrize(
    ("cut", "case", "asked"),
    [
        *((THREE, case, {}) for case in CASES),
        *((THREE, case, UNGUIDED) for case in ("text", "video and mask", "all")),
        *((ONE, case, {}) for case in ("text", "all")),
    ],
)
def test_replicas_equal_stock(
    splits: Load[Split], ask: Any, stock: Stock, cut: str, case: str, asked: dict[str, Any]
) -> None:
    """Of seven frames five count, or all, and stock fills up to nine."""
    split, given = splits(cut), CASES[case]
    assert np.array_equal(split.generate(ask(given, **asked)), stock.frames(given, **PLAIN | asked))
    assert split.bytes_in_use() == {}


@pytest.mark.parametrize("halves", [("text_encoder", "transformer"), ("vae",), ("text_encoder", "transformer", "vae")])
@pytest.mark.parametrize("case", ["text", "all"])
def test_bfloat16_equals_stock(
    configure: Callable[..., Config],
    checkpoint: Callable[[str], Path],
    images: Any,
    ask: Any,
    case: str,
    halves: tuple[str, ...],
) -> None:
    asked = {"conditioning_scale": 0.7}
    with LocalPipeline(configure(*(f"model.dtype.{name}=bfloat16" for name in halves))) as pipeline:
        made = pipeline.generate(ask(CASES[case], **asked)).frames
    dtypes = dict.fromkeys(halves, torch.bfloat16) | {"default": torch.float32}
    stock = Stock(checkpoint("tiny-vace"), images, dtypes)
    assert np.array_equal(made, stock.frames(CASES[case], **PLAIN | asked))


def test_a_lora_changes_frames_as_stock_s(
    configure: Callable[..., Config], checkpoint: Callable[[str], Path], images: Any, ask: Any, tmp_path: Path
) -> None:
    weights = factors(TO_Q) | factors("transformer.vace_blocks.1.attn1.to_q", seed=1)
    save_file(weights, tmp_path / "lora.safetensors")
    with LocalPipeline(configure(f"{DENOISER}.loras=[{{path: {tmp_path / 'lora.safetensors'}}}]")) as pipeline:
        made = pipeline.generate(ask(CASES["all"])).frames
    stock = Stock(checkpoint("tiny-vace"), images)
    plain = stock.frames(CASES["all"], **PLAIN)
    stock.pipeline.load_lora_weights(weights)
    assert np.array_equal(made, stock.frames(CASES["all"], **PLAIN))
    assert not np.array_equal(made, plain)


def test_tiles_of_encoder_and_decoder_equal_stock_s(configure: Callable[..., Config], ask: Any, stock: Stock) -> None:
    cut = ("stages.decoder=null", *(f"stages.decoder_{k}.blocks=[decode.{k}of2]" for k in (1, 2)))
    cut = (*cut, "stages.join.blocks=[blend]", "stages.encoder.vae.tile_pixels=0")
    asked, given = {"height": 32, "width": 272, "num_inference_steps": 1}, ("reference_images",)
    stock.pipeline.vae.enable_tiling()
    expected = stock.frames(given, **PLAIN | asked)
    stock.pipeline.vae.use_tiling = False
    with LocalPipeline(configure(*cut)) as pipeline:
        assert np.array_equal(pipeline.generate(ask(given, **asked)).frames, expected)
    assert not np.array_equal(stock.frames(given, **PLAIN | asked), expected)


def test_every_stage_warms_up_and_other_options_only_round(
    configure: Callable[..., Config], ask: Any, stock: Stock
) -> None:
    warm = [f"stages.{stage}.warm_up=[[64,96,5]]" for stage in ("encoder", "transformer", "decoder")]
    fast = (f"{DENOISER}.fuse=true", f"{DENOISER}.attention=auto", "stages.decoder.vae.channels_last=true")
    with LocalPipeline(configure(*warm, *fast)) as pipeline:
        made = pipeline.generate(ask(CASES["all"])).frames
    assert np.abs(made - stock.frames(CASES["all"], **PLAIN)).max() < 1e-4


@pytest.mark.proof
def test_pipelines_on_ray_share_guidance_among_ranks(
    cluster: None, configure: Callable[..., Config], ask: Any, stock: Stock
) -> None:
    with Pipeline(configure("stages.transformer.parallel.cfg=2")) as pipeline:
        handles = {case: pipeline.submit(ask(CASES[case])) for case in CASES}
        for case, handle in handles.items():
            assert np.array_equal(handle.result(240).frames, stock.frames(CASES[case], **PLAIN))
        wait_until_empty(pipeline, 30.0)


def test_stages_are_profiled_by_text_alone(configure: Callable[..., Config], ask: Any) -> None:
    profile = measure_profile(configure(), [ask()], repeats=1)
    assert [stage.name for stage in profile.stages] == ["encoder", "transformer", "decoder"]


def test_sizes_of_the_published_models(configure: Callable[..., Config]) -> None:
    geometry = open_checkpoint(configure().model).geometry  # alike in all that counts here
    sizes = geometry.tensor_bytes(480 * 832, 81, 100)
    assert geometry.tensor_shapes(480, 832, 81)["control_hidden_states"] == (1, 96, 21, 60, 104)
    assert sizes["control_hidden_states"] == 4 * 96 * (21 + 4) * 60 * 104
    assert (sizes["video"], sizes["mask"], sizes["reference_images"]) == (97_044_480, 32_348_160, 4 * 300)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (f"{DENOISER}.step_cache.method=taylorseer", "is not for model.task=vace"),
        ("stages.transformer.parallel.ulysses=2", "parallel.ulysses=2: must be left out: models of model.task=vace"),
        ("stages.transformer.parallel={cfg: 2, shard_weights: true}", "shard_weights=true: must be left out"),
        ("defaults.guidance_scale_2=3", "has one transformer; write null"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(
    configure: Callable[..., Config], override: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        check_model(configure(override), whole=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vace_in_channels": 36}, "with a control of other channels than 96"),
        ({"image_dim": 32}, "with a transformer that wants an image encoder"),
        ({"vace_layers": [1, 2]}, "cannot be loaded"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    folder = copy_changed(checkpoint("tiny-vace"), tmp_path, "transformer/config.json", changes)
    with pytest.raises(CheckpointError, match=re.escape(says)):
        LocalPipeline.from_config(CONF / "tiny_vace.yaml", f"model.path={folder}")
