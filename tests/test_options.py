"""Options that make a stage faster or smaller: what each does to the frames, and what is refused."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers import offload
from safetensors.torch import save_file

from disagg_ray import CheckpointError, ConfigError, LocalPipeline, Request, RequestError, load_config
from disagg_ray.models.wan.shapes import get_shape

CONF = Path(__file__).parents[1] / "conf"
SMALL = ("model.max_sequence_length=64", "limits.max_pixels=4096", "limits.max_frames=9", "defaults.num_frames=9")
SIZE = "[[32,48,5]]"
DENOISER, VAE = "stages.transformer.denoiser", "stages.decoder.vae"
ON_GPU = tuple(f"stages.{stage}.num_gpus=1" for stage in ("encoder", "transformer", "decoder"))
FIRST_BLOCK = (f"{DENOISER}.step_cache.method=first_block", f"{DENOISER}.step_cache.threshold=10")

CLOSE = {
    "fused passes": (f"{DENOISER}.fuse=true",),
    "attention by name": (f"{DENOISER}.attention=_native_math",),
    "fastest attention": (f"{DENOISER}.attention=auto", f"stages.transformer.warm_up={SIZE}"),
    "fastest attention at the default size": (f"{DENOISER}.attention=auto",),
    "channels last": (f"{VAE}.channels_last=true",),
    "tiles only for larger sizes": (f"{VAE}.tile_pixels=4096",),
    "warm-up": tuple(f"stages.{s}.warm_up={SIZE}" for s in ("encoder", "transformer", "decoder")),
}  # fmt: skip
"""Options that may change no more than the order of sums."""

CLOSE = {name: tuple(overrides) for name, overrides in CLOSE.items()}

CACHES = {
    "first_block": FIRST_BLOCK,
    "mag": (f"{DENOISER}.step_cache.method=mag", f"{DENOISER}.step_cache.ratios=[1,1,1,1,1,1]"),
    "sea": (f"{DENOISER}.step_cache.method=sea", f"{DENOISER}.step_cache.threshold=10"),
    "taylorseer": (f"{DENOISER}.step_cache.method=taylorseer", f"{DENOISER}.step_cache.interval=2"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs be traced whole, as for any backend, and run by torch: a C++ compiler would take minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture(scope="module")
def start(checkpoint: Callable[[str], Path]) -> Callable[..., LocalPipeline]:
    """Start a tiny model's stages in one process."""

    def load(*overrides: str, task: str = "t2v") -> LocalPipeline:
        folder = checkpoint(f"tiny-{task.replace('_', '-')}")
        return LocalPipeline.from_config(CONF / f"tiny_{task}.yaml", f"model.path={folder}", *SMALL, *overrides)

    return load


@pytest.fixture(scope="module")
def plain(start: Callable[..., LocalPipeline]) -> Callable[..., np.ndarray]:
    """Give the frames without any option."""
    pipelines = cache(lambda task: start(task=task))
    return cache(lambda task="t2v", **asked: frames(pipelines(task), task=task, **asked))


def arguments(task: str = "t2v", **asked: Any) -> dict[str, Any]:
    two = {"guidance_scale_2": 2.5} if "a14b" in task else {}
    return {"prompt": "a red circle", "height": 32, "width": 48, "num_frames": 5, "guidance_scale": 5.0,
            "num_inference_steps": 6} | two | asked  # fmt: skip


def frames(pipeline: LocalPipeline, task: str = "t2v", **asked: Any) -> np.ndarray:
    made = pipeline.generate(Request(**arguments(task, **asked), seed=7, format="npy")).frames
    assert made is not None
    return made


def stock_pipeline(folder: Path, task: str = "t2v") -> Any:
    kind = getattr(diffusers, get_shape(f"tiny-{task.replace('_', '-')}").pipeline)
    pipeline = kind.from_pretrained(folder, dtype={"default": torch.float32})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_frames(pipeline: Any, task: str = "t2v", **asked: Any) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(7)
    result = pipeline(**arguments(task, **asked), negative_prompt="", generator=generator, max_sequence_length=64)
    made: np.ndarray = result.frames[0]
    return made


@pytest.mark.parametrize("name", CLOSE)
def test_option_changes_nothing_but_rounding(
    start: Callable[..., LocalPipeline], plain: Callable[..., np.ndarray], name: str
) -> None:
    assert np.abs(frames(start(*CLOSE[name])) - plain()).max() < 1e-4


@pytest.mark.parametrize("how", ["group", "model"])
def test_offloading_changes_nothing_but_rounding(
    start: Callable[..., LocalPipeline], plain: Callable[..., np.ndarray], how: str
) -> None:
    pipeline = start()
    for stage in pipeline.stages:
        offload(stage, how)
    assert np.abs(frames(pipeline) - plain()).max() < 1e-4


@pytest.mark.parametrize("task", ["i2v", "flf2v", "a14b_i2v"])
def test_every_stage_of_every_task_warms_up(
    start: Callable[..., LocalPipeline], image: Callable[..., Any], task: str
) -> None:
    images = {"image": image(48, 32)} | ({"last_image": image(48, 32, seed=1)} if task == "flf2v" else {})
    warm = [f"stages.{stage}.warm_up={SIZE}" for stage in ("encoder", "transformer", "decoder")]
    cold, warmed = (start(*o, "model.max_sequence_length=512", task=task) for o in ((), warm))
    assert np.array_equal(*(frames(p, task, num_inference_steps=2, **images) for p in (cold, warmed)))


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("task", ["t2v", "a14b_t2v"])
def test_step_cache_equals_stock_s_and_starts_empty(
    start: Callable[..., LocalPipeline], plain: Callable[..., np.ndarray], checkpoint: Callable[[str], Path],
    task: str, name: str,
) -> None:  # fmt: skip
    pipeline = start(*CACHES[name], task=task)
    first, other, again = (frames(pipeline, task, prompt=prompt) for prompt in ("a red circle", "blue", "a red circle"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, plain(task))
    stock = stock_pipeline(checkpoint(f"tiny-{task.replace('_', '-')}"), task)
    from_diffusers = {
        "first_block": lambda: diffusers.FirstBlockCacheConfig(10),
        "mag": lambda: diffusers.MagCacheConfig(num_inference_steps=6, mag_ratios=[1.0] * 6),
        "sea": lambda: diffusers.SeaCacheConfig(10),
        "taylorseer": lambda: diffusers.TaylorSeerCacheConfig(2, use_lite_mode=True),
    }
    for transformer in filter(None, (stock.transformer, stock.transformer_2)):
        transformer.enable_cache(from_diffusers[name]())
    assert np.array_equal(first, stock_frames(stock, task))


def test_cancelled_request_leaves_no_step_cache(start: Callable[..., LocalPipeline]) -> None:
    pipeline = start(*FIRST_BLOCK)
    expected = frames(pipeline)
    _, transformer, _ = pipeline.stages

    def stop(step: int, steps: int) -> None:
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        compute = transformer.compute
        patch.setattr(transformer, "compute", lambda request, tensors, _: compute(request, tensors, stop))
        frames(pipeline, prompt="blue")
    assert np.array_equal(frames(pipeline), expected)


@pytest.mark.parametrize("name", ["none", "first_block"])
@pytest.mark.parametrize("how", ["none", "group"])
def test_compiled_denoiser_goes_with_cache_and_offload(
    traced_only: None, start: Callable[..., LocalPipeline], name: str, how: str
) -> None:
    options = CACHES.get(name, ())
    eager = frames(start(*options), num_inference_steps=3)
    compiled = start(*options, f"{DENOISER}.compile=default")
    offload(compiled.stages[1], how)
    assert np.abs(frames(compiled, num_inference_steps=3) - eager).max() < 1e-3


def test_compiled_vae_makes_the_same_frames(
    traced_only: None, start: Callable[..., LocalPipeline], plain: Callable[..., np.ndarray]
) -> None:
    assert np.abs(frames(start(f"{VAE}.compile=true", f"{VAE}.channels_last=true")) - plain()).max() < 1e-4


def test_eight_bit_weights_are_smaller_and_near(
    start: Callable[..., LocalPipeline], plain: Callable[..., np.ndarray]
) -> None:
    pipeline = start(f"{DENOISER}.quantization=fp8_storage")
    weight = pipeline.stages[1].component("transformer").blocks[0].ffn.net[2].weight
    assert weight.dtype == torch.float8_e4m3fn
    error = np.abs(frames(pipeline, num_inference_steps=2) - plain(num_inference_steps=2)).mean()
    assert 0 < error < 0.05


def test_tiled_decode_differs_and_equals_stock_s(
    start: Callable[..., LocalPipeline], plain: Callable[..., np.ndarray], checkpoint: Callable[[str], Path]
) -> None:
    large = ("limits.max_pixels=131072",)
    size: dict[str, Any] = {"height": 272, "width": 288, "num_frames": 1, "num_inference_steps": 1}
    tiled = frames(start(f"{VAE}.tile_pixels=60000", *large), **size)
    assert not np.array_equal(tiled, frames(start(*large), **size))
    stock = stock_pipeline(checkpoint("tiny-t2v"))
    stock.vae.enable_tiling()
    assert np.array_equal(tiled, stock_frames(stock, **size))


def make_lora(folder: Path, seed: int = 0, width: int = 48, prefix: str = "transformer.blocks.0.attn1.to_q") -> Path:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"{prefix}.lora_A.weight": torch.randn(4, width, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(width, 4, generator=generator),
    }
    file = folder / f"lora{seed}.safetensors"
    save_file(weights, file)
    return file


def with_loras(*loras: tuple[Path, float, str]) -> str:
    entries = [f"{{path: {path}, strength: {strength}, transformer: {name}}}" for path, strength, name in loras]
    return f"{DENOISER}.loras=[{', '.join(entries)}]"


def test_lora_counts_by_its_strength(
    start: Callable[..., LocalPipeline], plain: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    file = make_lora(tmp_path)
    none, half, whole = (frames(start(with_loras((file, s, "transformer")))) for s in (0, 0.5, 1))
    assert np.array_equal(none, plain())
    assert not np.array_equal(whole, plain())
    assert not np.array_equal(whole, half)


@pytest.mark.parametrize("task", ["t2v", "a14b_t2v"])
def test_two_loras_equal_stock_s(
    start: Callable[..., LocalPipeline], checkpoint: Callable[[str], Path], tmp_path: Path, task: str
) -> None:
    second = "transformer_2" if "a14b" in task else "transformer"
    files = [make_lora(tmp_path, seed) for seed in (0, 1)]
    ours = frames(start(with_loras((files[0], 1.0, "transformer"), (files[1], 0.7, second)), task=task), task)
    stock = stock_pipeline(checkpoint(f"tiny-{task.replace('_', '-')}"), task)
    stock.load_lora_weights(files[0], adapter_name="a")
    stock.load_lora_weights(files[1], adapter_name="b", load_into_transformer_2=second == "transformer_2")
    if second == "transformer":
        stock.set_adapters(["a", "b"], [1.0, 0.7])
    else:
        stock.transformer_2.set_adapters("b", 0.7)
    assert np.array_equal(ours, stock_frames(stock, task))


def test_unfit_lora_files_are_refused(start: Callable[..., LocalPipeline], tmp_path: Path) -> None:
    def refusal(file: Path, kind: type[Exception] = CheckpointError, name: str = "transformer") -> str:
        with pytest.raises(kind, match="loras") as caught:
            start(with_loras((file, 1.0, name)))
        return str(caught.value)

    assert "is no file" in refusal(tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x80\x04pickle, for all we know")
    assert "cannot be read" in refusal(broken)
    assert "of its 2 keys 2 match no layer" in refusal(make_lora(tmp_path, prefix="transformer.blocks.99.attn1.to_q"))
    assert "2 of its 2 keys begin with none of transformer." in refusal(
        make_lora(tmp_path, prefix="blocks.0.attn1.to_q")
    )
    assert "cannot be loaded" in refusal(make_lora(tmp_path, width=32))
    assert "has no transformer_2" in refusal(make_lora(tmp_path), ConfigError, "transformer_2")
    assert "must be a .safetensors file" in refusal(tmp_path / "pickle.bin", ConfigError)


@pytest.mark.parametrize("task", ["t2v", "a14b_t2v"])
@pytest.mark.parametrize("shift", [None, 7.0])
def test_euler_equals_stock_s(
    start: Callable[..., LocalPipeline], checkpoint: Callable[[str], Path], task: str, shift: float | None
) -> None:
    stock = stock_pipeline(checkpoint(f"tiny-{task.replace('_', '-')}"), task)
    shifted = shift or stock.scheduler.config.flow_shift
    stock.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(stock.scheduler.config, shift=shifted)
    overrides = [] if shift is None else [f"model.flow_shift={shift}"]
    ours = start("model.scheduler=euler", *overrides, task=task)
    assert np.array_equal(frames(ours, task), stock_frames(stock, task))


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_sigmas_decide_the_steps(start: Callable[..., LocalPipeline], scheduler: str) -> None:
    common = ("model.flow_shift=1", f"model.scheduler={scheduler}")
    given = start(*common, "model.sigmas=[1.0,0.75,0.5,0.25]")
    seen = frames(given, num_inference_steps=None)
    assert np.array_equal(seen, frames(given, num_inference_steps=4))
    timesteps = given.stages[1].component("scheduler").timesteps.tolist()
    assert np.allclose(timesteps, [1000, 750, 500, 250], atol=1)
    assert not np.array_equal(seen, frames(start(*common), num_inference_steps=4))
    with pytest.raises(RequestError, match=r"num_inference_steps=6: must be left out: model\.sigmas holds 4"):
        frames(given, num_inference_steps=6)


def test_where_no_step_cache_can_be_had_the_remedy_is_none() -> None:
    with pytest.raises(ConfigError, match=r"is not for model\.task=vace; write none$"):
        load_config("conf/tiny_vace.yaml", f"{DENOISER}.step_cache.method=taylorseer")


def test_sea_cache_is_refused_for_images(start: Callable[..., LocalPipeline]) -> None:
    with pytest.raises(ConfigError, match="write one of none, first_block, mag, taylorseer"):
        start(f"{DENOISER}.step_cache.method=sea", "model.max_sequence_length=512", task="i2v")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("stages.encoder.denoiser.compile=default",), "stages.encoder.denoiser: given, but .* hold no transformer"),
        (("stages.transformer.vae.compile=true",), "stages.transformer.vae: given, but .* hold no vae"),
        ((f"{DENOISER}.attention=flash_2",), "attention: 'flash_2' cannot be used here"),
        ((f"{DENOISER}.attention=flash",), "attention: 'flash' cannot be used here: .*install"),
        ((f"{DENOISER}.attention=flash_4",), "denoiser.attention=flash_4: it needs a GPU; write auto"),
        ((f"{DENOISER}.quantization=fp8",), "fp8 needs the library torchao"),
    ],
)
def test_options_that_cannot_be_had_here_are_refused(
    start: Callable[..., LocalPipeline], overrides: tuple[str, ...], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        start(*overrides)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((f"{DENOISER}.compile=reduce-overhead",), "max-autotune-no-cudagraphs"),
        ((f"{DENOISER}.compile=default", f"{DENOISER}.quantization=fp8_storage"), "cannot be compiled"),
        ((f"{DENOISER}.quantization=fp8", *ON_GPU, "stages.transformer.offload=group"), "neither offload nor loras"),
        ((f"{DENOISER}.quantization=int4",), "must be one of none, fp8_storage, fp8"),
        ((f"{DENOISER}.step_cache.method=pab",), "must be one of none, first_block"),
        ((f"{DENOISER}.step_cache.threshold=0.1",), "for first_block, mag or sea"),
        ((f"{DENOISER}.step_cache.interval=2",), "for taylorseer"),
        ((f"{DENOISER}.step_cache.method=mag",), "must be the model's positive ratios for mag"),
        (("stages.decoder.offload=disk",), "must be one of none, group, model"),
        (("stages.decoder.warm_up=[[32,48]]",), "must be .height, width, num_frames."),
        (("stages.decoder.warm_up=[[33,48,5]]",), "multiple of 16"),
        (("stages.decoder.warm_up=[[32,48,6]]",), "4k \\+ 1"),
        (("stages.decoder.vae.tile_pixels=-1",), "at least 0"),
        (("stages.decoder.vae.tiles=3",), "stages.decoder.vae.tiles: no such key"),
        (("model.scheduler=ddim",), "one of unipc, euler or null"),
        (("model.sigmas=[0.5,0.75]",), "must fall from at most 1"),
        (("model.sigmas=[1.0,0.0]",), "must fall from at most 1"),
        (
            ("model.sigmas=[0.9,0.5]", "limits.max_steps=1", "defaults.num_inference_steps=1"),
            "must be at most limits.max_steps=1",
        ),
        (
            (*ON_GPU, "fused=true", "stages.decoder.offload=group", "stages.encoder.offload=model"),
            "offload='group' can",
        ),
    ],
)
def test_impossible_options_are_refused_before_anything_starts(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(CONF / "tiny_t2v.yaml", *SMALL, *overrides)


def test_fused_keeps_each_stage_s_options() -> None:
    overrides = (f"{VAE}.channels_last=true", f"stages.transformer.warm_up={SIZE}", *FIRST_BLOCK, "fused=true")
    fused = load_config(CONF / "tiny_t2v.yaml", *SMALL, *overrides).stages["fused"]
    assert (fused.vae.channels_last, fused.denoiser.step_cache.threshold, fused.warm_up) == (True, 10, [[32, 48, 5]])
