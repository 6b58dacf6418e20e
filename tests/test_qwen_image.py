"""Qwen-Image: images equal stock's bit for bit, split and fused; what it lacks is refused by name."""

import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import copy_changed, wait_until_empty
from PIL import Image
from splits import ONE, THREE, Load, Split

from disagg_ray import CheckpointError, ConfigError, LocalPipeline, Pipeline, Request, RequestError, load_config
from disagg_ray.cli.command import main
from disagg_ray.config.schema import Config
from disagg_ray.media.video import quantise
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.prompts import check_prompts
from disagg_ray.models.qwen_image.random import build_meta, make_tokenizer
from disagg_ray.models.qwen_image.shapes import SHAPES
from disagg_ray.models.qwen_image.text import TEMPLATE
from disagg_ray.request import resolve

CONF = Path(__file__).parents[1] / "conf"
PLAIN: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "blurry", "height": 64, "width": 96, "num_inference_steps": 3,
    "guidance_scale": 4.0, "seed": 7,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0, "prompt": "two", "height": 96, "width": 64},
    "nothing in the negative prompt": {"negative_prompt": "", "prompt": "{braces} 红色的圆", "seed": 2**63 - 1},
}
"""What differs from `PLAIN`."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configure(checkpoint: Callable[[str], Path]) -> Callable[..., Config]:
    """Give the tiny model's configuration with some overrides."""
    model = f"model.path={checkpoint('tiny-qwen-image')}"
    return lambda *overrides: load_config(CONF / "tiny_qwen_image.yaml", model, *overrides)


@pytest.fixture(scope="module")
def expect(checkpoint: Callable[[str], Path]) -> Callable[[str], np.ndarray]:
    """Give the stock pipeline's image of a case."""
    stock = diffusers.QwenImagePipeline.from_pretrained(checkpoint("tiny-qwen-image"))
    stock.set_progress_bar_config(disable=True)

    @cache
    def make(case: str) -> np.ndarray:
        asked = PLAIN | CASES[case]
        generator = torch.Generator("cpu").manual_seed(asked.pop("seed"))
        scale = asked.pop("guidance_scale")
        made: np.ndarray = stock(**asked, true_cfg_scale=scale, generator=generator, output_type="np").images
        return made

    return make


def ask(case: str = "guided", **asked: Any) -> Request:
    return Request(**(PLAIN | CASES[case] | {"format": "npy"} | asked))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", [THREE, ONE])
def test_replicas_equal_stock(splits: Load[Split], expect: Callable[[str], np.ndarray], cut: str, case: str) -> None:
    split = splits(cut)
    assert np.array_equal(split.generate(ask(case)), expect(case))
    assert split.bytes_in_use() == {}


def test_one_process_equals_stock(configure: Callable[..., Config], expect: Callable[[str], np.ndarray]) -> None:
    with LocalPipeline(
        configure("stages.decoder.warm_up=[[32,48,1]]", "stages.transformer.warm_up=[[32,48,1]]")
    ) as local:
        for case in CASES:
            assert np.array_equal(local.generate(ask(case)).frames, expect(case)), case


def test_bfloat16_and_tiles_equal_stock_s(checkpoint: Callable[[str], Path], configure: Callable[..., Config]) -> None:
    stock = diffusers.QwenImagePipeline.from_pretrained(checkpoint("tiny-qwen-image"), dtype=torch.bfloat16)
    stock.set_progress_bar_config(disable=True)
    stock.vae.enable_tiling()
    asked = {"prompt": "a", "negative_prompt": "b", "height": 288, "width": 320, "num_inference_steps": 2}
    generator = torch.Generator("cpu").manual_seed(7)
    expected = stock(**asked, true_cfg_scale=4.0, generator=generator, output_type="np").images
    dtypes = "model.dtype={text_encoder: bfloat16, transformer: bfloat16, vae: bfloat16}"
    with LocalPipeline(configure(dtypes, "stages.decoder.vae.tile_pixels=0", "limits.max_pixels=92160")) as local:
        assert np.array_equal(local.generate(Request(**asked, seed=7, format="npy")).frames, expected)


@pytest.mark.slow
def test_an_image_is_made_through_ray_and_read_back(
    cluster: None, configure: Callable[..., Config], expect: Callable[[str], np.ndarray], tmp_path: Path
) -> None:
    with Pipeline(configure()) as pipeline:
        for suffix, format in ((".png", None), (".webp", "webp"), (".jpg", "jpg")):
            path = pipeline.generate(ask(format=format)).save(tmp_path / f"circle{suffix}")
            read = np.asarray(Image.open(path)).astype(int)
            assert np.abs(read - quantise(expect("guided")[0])).max() <= (0 if suffix != ".jpg" else 64), suffix
        wait_until_empty(pipeline, 30)


def test_the_command_writes_an_image(configure: Callable[..., Config], tmp_path: Path) -> None:
    given = [
        "--config",
        str(CONF / "tiny_qwen_image.yaml"),
        f"model.path={configure().model.path}",
        "--local",
        "--quiet",
    ]
    asked = ["--prompt", "a", "--seed", "1", "--output", str(tmp_path / "a.png"), "defaults.num_inference_steps=2"]
    assert main(["generate", *given, *asked]) == 0
    assert Image.open(tmp_path / "a.png").size == (64, 64)
    assert main(["generate", *given, *asked[:-2], str(tmp_path / "a.mp4")]) == 2


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            {"num_frames": 5},
            "invalid num_frames=5: must be left out: models of model.family=qwen_image make images; those of",
        ),
        ({"fps": 16}, "invalid fps=16: must be left out"),
        ({"image": Image.new("RGB", (8, 8))}, "image: given, but a model of task t2i takes none"),
        ({"guidance_scale_2": 2.0}, "invalid guidance_scale_2=2.0: must be left out"),
        ({"format": "mp4"}, "invalid format='mp4': must be one of png, webp, jpg, npy: this model makes images"),
        ({"format": "frames"}, "invalid format='frames': must be one of png"),
        ({"num_inference_steps": 1}, "invalid num_inference_steps=1: must be at least 2"),
        ({"height": 50}, "invalid height=50: must be a positive multiple of 16; the nearest is 48"),
    ],
)
def test_what_an_image_has_not_is_refused_by_name(
    configure: Callable[..., Config], asked: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(ask(**asked), configure())
    assert str(caught.value).startswith(says)


def test_a_video_is_no_png(configure: Callable[..., Config]) -> None:
    with pytest.raises(
        RequestError, match="format='png': must be one of mp4, gif, frames, npy: this model makes videos"
    ):
        resolve(Request("a", format="png"), load_config(CONF / "tiny_t2v.yaml"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.flow_shift=3", "invalid model.flow_shift=3"),
        ("model.scheduler=unipc", "invalid model.scheduler='unipc'"),
        ("model.task=t2v", "invalid model.task='t2v': must be one of t2i"),
        ("defaults.num_frames=5", "invalid defaults.num_frames=5: must be 1"),
        ("stages.transformer.denoiser.fuse=true", "invalid stages.transformer.denoiser.fuse"),
        (
            "stages.transformer.denoiser.step_cache.method=first_block",
            "invalid stages.transformer.denoiser.step_cache.method='first_block'",
        ),
        ("stages.transformer.parallel.ulysses=2", "invalid stages.transformer.parallel.ulysses=2: must be left out"),
        ("stages.decoder.warm_up=[[64,64,5]]", "invalid stages.decoder.warm_up=5: must be 1"),
    ],
)
def test_what_the_model_has_not_is_refused_by_key(configure: Callable[..., Config], override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(override)
    assert str(caught.value).startswith(says)


def test_the_speed_presets_leave_out_what_the_model_has_not() -> None:
    fast = load_config(CONF / "qwen_image.yaml", "speed=fast").stages
    assert (fast["transformer"].denoiser.compile, fast["transformer"].denoiser.fuse) == ("default", False)
    assert (fast["decoder"].vae.channels_last, fast["decoder"].vae.compile) == (True, False)


def test_a_text_that_would_be_cut_off_is_refused(configure: Callable[..., Config]) -> None:
    config = configure("model.max_sequence_length=300")
    overhead = len(make_tokenizer()(TEMPLATE.format("")).input_ids) - 34
    check_prompts(resolve(ask(prompt="x" * (300 - overhead)), config)[0], config.model)
    with pytest.raises(RequestError, match=r"^prompt: 301 tokens are over the model's 300"):
        check_prompts(resolve(ask(prompt="x" * (301 - overhead)), config)[0], config.model)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
        ("transformer/config.json", {"use_layer3d_rope": True}, "use_layer3d_rope"),
        ("transformer/config.json", {"in_channels": 128}, "in_channels other than the 64"),
        ("model_index.json", {"_class_name": "WanPipeline"}, "model.family: 'qwen_image' does not fit"),
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "model.task: 't2i' does not fit"),
        ("model_index.json", {"_class_name": "QwenImageLayeredPipeline"}, "QwenImagePipeline, QwenImageEdit"),
    ],
)
def test_other_models_are_refused_by_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    folder = copy_changed(checkpoint("tiny-qwen-image"), tmp_path, file, changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(load_config(CONF / "tiny_qwen_image.yaml", f"model.path={folder}").model)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("transformer/config.json", {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128}, "lacks "),
        ("transformer/config.json", {"out_channels": 8}, "holds 'proj_out.weight' of shape [64, 32]"),
        ("vae/config.json", {"base_dim": 96}, "holds "),
        ("text_encoder/config.json", {"text_config": {"intermediate_size": 2**36}}, " numbers, and its configuration"),
        ("text_encoder/config.json", {"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers in "),
    ],
)
def test_weights_of_another_model_than_the_configuration_s_are_refused_before_memory_is_taken(
    checkpoint: Callable[[str], Path], tmp_path: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    """Some of these configurations make more than any machine holds."""
    given = json.loads((checkpoint("tiny-qwen-image") / file).read_text())
    nested = {key: given[key] | value for key, value in changes.items() if isinstance(value, dict)}
    folder = copy_changed(checkpoint("tiny-qwen-image"), tmp_path, file, changes | nested)
    with pytest.raises(CheckpointError) as caught:
        LocalPipeline.from_config(CONF / "tiny_qwen_image.yaml", f"model.path={folder}")
    assert str((folder / file).parent) in str(caught.value)
    assert says in str(caught.value)


def test_weights_of_another_class_are_refused_before_memory_is_taken(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("tiny-qwen-image"), tmp_path / "model"))
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    shutil.copy(checkpoint("tiny-t2v") / weights, folder / weights)
    with pytest.raises(CheckpointError, match=r"transformer' lacks \d+ tensors, as "):
        LocalPipeline.from_config(CONF / "tiny_qwen_image.yaml", f"model.path={folder}")


def test_the_published_shape_has_the_published_sizes() -> None:
    modules = build_meta(SHAPES["qwen-image"])
    billions = {name: sum(p.numel() for p in module.parameters()) / 1e9 for name, module in modules.items()}
    assert billions == pytest.approx({"text_encoder": 8.292, "vae": 0.1269, "transformer": 20.43}, rel=0.001)


def test_a_png_holds_what_is_computed() -> None:
    from disagg_ray.media.video import encode

    frame = np.random.default_rng(0).random((1, 16, 48, 3), np.float32)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(frame, 1, "png")))), quantise(frame[0]))
