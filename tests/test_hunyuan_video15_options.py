"""Options of HunyuanVideo 1.5: what stock can do too equals stock bit for bit, the rest changes rounding alone."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import offload
from PIL import Image
from safetensors.torch import save_file

from disagg_ray import CheckpointError, LocalPipeline, Request, load_config

CONF = Path(__file__).parents[1] / "conf"
DENOISER = "stages.transformer.denoiser"
PLAIN: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "blurry", "height": 32, "width": 48, "num_frames": 1,
    "num_inference_steps": 5, "guidance_scale": 6.0, "seed": 7,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(checkpoint: Callable[[str], Path]) -> Callable[..., LocalPipeline]:
    """Start a tiny model's stages in one process."""

    def load(*overrides: str, task: str = "") -> LocalPipeline:
        path = f"model.path={checkpoint(f'tiny-hunyuan-video15{task}')}"
        file = CONF / f"tiny_hunyuan_video15{task.replace('-', '_')}.yaml"
        return LocalPipeline(load_config(file, path, "model.max_sequence_length=64", *overrides))

    return load


def frames(pipeline: LocalPipeline, **asked: Any) -> np.ndarray:
    made = pipeline.generate(Request(**PLAIN | asked, format="npy")).frames
    assert made is not None
    return made


@pytest.fixture(scope="module")
def plain(start: Callable[..., LocalPipeline], image: Callable[..., Image.Image]) -> Callable[..., np.ndarray]:
    """Give the frames of a task without any option."""
    given = {"": {}, "-i2v": {"image": image(190, 130)}}
    return cache(lambda task="": frames(start(task=task), **given[task]))


def lora(folder: Path, width: int = 32) -> tuple[str, dict[str, torch.Tensor]]:
    """Write a LoRA of a layer of the video and one of the text; return the override that loads it, and its tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (4, width), "B": (width, 4)}
    layer = "transformer.transformer_blocks.0.attn"
    weights = {
        f"{layer}.{name}.lora_{half}.weight": torch.randn(shape, generator=generator)
        for name in ("to_q", "add_k_proj")
        for half, shape in shapes.items()
    }
    save_file(weights, folder / "lora.safetensors")
    return f"{DENOISER}.loras=[{{path: {folder / 'lora.safetensors'}, strength: 0.5}}]", weights


@pytest.mark.parametrize("name", ["fp8_storage", "taylorseer", "lora"])
def test_an_option_makes_what_stock_makes_with_it(
    start: Any, plain: Any, checkpoint: Any, tmp_path: Path, name: str
) -> None:
    override, weights = lora(tmp_path)
    overrides = {
        "fp8_storage": (f"{DENOISER}.quantization=fp8_storage",),
        "taylorseer": (f"{DENOISER}.step_cache.method=taylorseer", f"{DENOISER}.step_cache.interval=2"),
        "lora": (override,),
    }[name]
    stock = diffusers.HunyuanVideo15Pipeline.from_pretrained(checkpoint("tiny-hunyuan-video15"))
    stock.set_progress_bar_config(disable=True)
    stock.tokenizer_max_length = 64
    if name == "fp8_storage":
        stock.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    if name == "taylorseer":
        stock.transformer.enable_cache(diffusers.TaylorSeerCacheConfig(2, use_lite_mode=True))
    if name == "lora":
        stock.transformer.load_lora_adapter(dict(weights), adapter_name="a")
        stock.transformer.set_adapters(["a"], [0.5])
    stock.guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0)
    asked = {key: value for key, value in PLAIN.items() if key not in ("guidance_scale", "seed")}
    expected = stock(**asked, generator=torch.Generator("cpu").manual_seed(7), output_type="np").frames[0]
    made = frames(start(*overrides))
    assert np.array_equal(made, expected)
    assert not np.array_equal(made, plain())


def test_a_lora_of_another_model_is_refused(start: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"denoiser.loras: .* cannot be loaded: "):
        start(lora(tmp_path, width=48)[0])


@pytest.mark.proof
@pytest.mark.parametrize("how", ["group", "model"])
@pytest.mark.parametrize("task", ["", "-i2v"])
def test_offloading_changes_nothing_but_rounding(
    start: Any, plain: Any, image: Callable[..., Image.Image], task: str, how: str
) -> None:
    pipeline = start(task=task)
    for stage in pipeline.stages:
        offload(stage, how)
    given = {"image": image(190, 130)} if task else {}
    assert np.abs(frames(pipeline, **given) - plain(task)).max() < 1e-4


@pytest.mark.proof
def test_compiling_changes_nothing_but_rounding(start: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # the other takes minutes
    vae = "stages.decoder.vae={compile: true, channels_last: true}"
    assert np.abs(frames(start(f"{DENOISER}.compile=default", vae)) - plain()).max() < 1e-4
