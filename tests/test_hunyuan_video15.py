"""HunyuanVideo 1.5: frames equal stock's bit for bit, split and fused; what it has not is refused by name."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts, format_text_input
from helpers import copy_changed, wait_until_empty
from PIL import Image
from splits import ONE, THREE, Load, Split

from disagg_ray import CheckpointError, ConfigError, LocalPipeline, Pipeline, Request, RequestError, load_config
from disagg_ray.config.schema import Config
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.hunyuan_video15.random import build_meta, make_tokenizer
from disagg_ray.models.hunyuan_video15.shapes import SHAPES
from disagg_ray.models.hunyuan_video15.text import BEFORE, NUM_DROPPED, prepare, quoted
from disagg_ray.models.prompts import check_prompts
from disagg_ray.request import resolve

CONF = Path(__file__).parents[1] / "conf"
SMALL = ("model.max_sequence_length=64", "limits.max_pixels=6144", "limits.max_frames=17")
PLAIN: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "blurry", "height": 32, "width": 48, "num_frames": 9,
    "num_inference_steps": 3, "guidance_scale": 6.0, "seed": 7,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0, "height": 48, "width": 32, "num_frames": 5},
    "quoted": {"prompt": 'a sign "open", “zu” and "open"', "negative_prompt": ""},
    "least": {"prompt": "two", "height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 1},
}
"""What differs from `PLAIN`."""
TINY = {"height": 32, "width": 16, "num_frames": 1, "num_inference_steps": 2}
"""The size of requests of which it does not matter."""

pytestmark = pytest.mark.usefixtures("one_thread")


def ask(case: str = "guided", **asked: Any) -> Request:
    return Request(**(PLAIN | CASES[case] | {"format": "npy"} | asked))


@pytest.fixture(scope="module")
def configure(checkpoint: Callable[[str], Path]) -> Callable[..., Config]:
    """Give the tiny model's configuration with some overrides."""
    model = f"model.path={checkpoint('tiny-hunyuan-video15')}"
    return lambda *overrides: load_config(CONF / "tiny_hunyuan_video15.yaml", model, *SMALL, *overrides)


@pytest.fixture(scope="module")
def make_stock(checkpoint: Callable[[str], Path]) -> Callable[..., Callable[..., np.ndarray]]:
    """Give what loads the stock pipeline, and makes frames of a request's fields with it."""

    def load(dtype: Any = torch.float32, tiles: bool = False, **scheduler: Any) -> Callable[..., np.ndarray]:
        stock = diffusers.HunyuanVideo15Pipeline.from_pretrained(checkpoint("tiny-hunyuan-video15"), dtype=dtype)
        stock.set_progress_bar_config(disable=True)
        stock.tokenizer_max_length = 64
        stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config, **scheduler)
        if tiles:
            stock.vae.enable_tiling()

        def make(**asked: Any) -> np.ndarray:
            asked = PLAIN | asked
            generator = torch.Generator("cpu").manual_seed(asked.pop("seed"))
            stock.guider = diffusers.ClassifierFreeGuidance(guidance_scale=asked.pop("guidance_scale"))
            frames: np.ndarray = stock(**asked, generator=generator, output_type="np").frames[0]
            return frames

        return make

    return load


@pytest.fixture(scope="module")
def expect(make_stock: Callable[..., Callable[..., np.ndarray]]) -> Callable[[str], np.ndarray]:
    """Give the stock pipeline's frames of a case."""
    make = make_stock()
    return cache(lambda case: make(**CASES[case]))


@pytest.mark.parametrize("cut", [THREE, ONE])
def test_replicas_equal_stock(splits: Load[Split], expect: Callable[[str], np.ndarray], cut: str) -> None:
    split = splits(cut)
    for case in CASES:
        assert np.array_equal(split.generate(ask(case)), expect(case)), case
    assert split.bytes_in_use() == {}


def test_one_process_equals_stock(configure: Callable[..., Config], expect: Callable[[str], np.ndarray]) -> None:
    with LocalPipeline(configure()) as local:
        for case in CASES:
            assert np.array_equal(local.generate(ask(case)).frames, expect(case)), case


def test_every_part_of_a_request_shows(make_stock: Any) -> None:
    fields: list[dict[str, Any]] = [
        {}, {"guidance_scale": 1.0}, {"prompt": "a blue square"}, {"prompt": '"a red circle"'}, {"negative_prompt": "0"}
    ]  # fmt: skip
    make = make_stock()
    assert len({make(**TINY, **asked).tobytes() for asked in fields}) == len(fields)


def test_bfloat16_and_tiles_equal_stock_s(configure: Callable[..., Config], make_stock: Any) -> None:
    size = {"height": 272, "width": 288, "num_frames": 1, "num_inference_steps": 2}
    dtypes = "model.dtype={text_encoder: bfloat16, transformer: bfloat16, vae: bfloat16}"
    with LocalPipeline(configure(dtypes, "stages.decoder.vae.tile_pixels=0", "limits.max_pixels=78336")) as local:
        made = local.generate(ask(**size)).frames
    assert np.array_equal(made, make_stock(torch.bfloat16, tiles=True)(**size))


def test_embeddings_reach_the_transformer_in_its_own_precision(
    configure: Callable[..., Config], make_stock: Any
) -> None:
    asked = TINY | {"prompt": 'a "b"'}
    mixed = {"text_encoder": torch.bfloat16, "text_encoder_2": torch.bfloat16, "default": torch.float32}
    with LocalPipeline(configure("model.dtype.text_encoder=bfloat16")) as local:
        assert np.array_equal(local.generate(ask(**asked)).frames, make_stock(mixed)(**asked))


@pytest.mark.parametrize(
    ("override", "shift", "asked"),
    [
        ("model.flow_shift=9", 9.0, {}),
        ("model.sigmas=[1.0,0.6]", 5.0, {"sigmas": [1.0, 0.6]}),
    ],
)
def test_a_schedule_of_one_s_own_equals_stock_s(
    configure: Callable[..., Config], make_stock: Any, override: str, shift: float, asked: dict[str, Any]
) -> None:
    with LocalPipeline(configure(override)) as local:
        made = local.generate(ask(**TINY)).frames
    assert np.array_equal(made, make_stock(shift=shift)(**TINY, **asked))


def test_every_stage_warms_up_and_a_text_is_encoded_once(configure: Any, expect: Any) -> None:
    warm = [f"stages.{stage}.warm_up=[[16,16,5]]" for stage in ("encoder", "transformer", "decoder")]
    kept: dict[Any, torch.Tensor] = {}
    cache = SimpleNamespace(get=kept.get, put=lambda key, tensor: kept.setdefault(key, tensor.clone()))
    with LocalPipeline(configure(*warm)) as local:
        local.stages[0].use_cache(cache)
        made = [local.generate(ask(seed=seed)).frames for seed in (1, 7)]
    assert len(kept) == 8  # four of each of two texts
    assert np.array_equal(made[1], expect("guided"))


@pytest.mark.slow
def test_a_pipeline_on_ray_equals_stock(cluster: None, configure: Any, expect: Any, tmp_path: Path) -> None:
    with Pipeline(configure()) as pipeline:
        pipeline.generate(ask("quoted")).save(tmp_path / "a.npy")
        file = pipeline.generate(ask(format="mp4")).save(tmp_path / "a.mp4")
        wait_until_empty(pipeline, 30)
    assert np.array_equal(np.load(tmp_path / "a.npy"), expect("quoted"))
    assert file.stat().st_size > 0


def test_a_prompt_is_tokenised_as_stock_tokenises_it() -> None:
    tokenizer = make_tokenizer()
    assert len(tokenizer(BEFORE, add_special_tokens=False).input_ids) == NUM_DROPPED
    for text in ("a red circle", "", " two lines\nof text "):
        chat = format_text_input([text], BEFORE.partition("system\n")[2].partition("<|im_end|>")[0])
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == [prepare(text)]
    for text in ("a", 'b "c" “d” "c"', '"" and e', '"', '"f\ng"', "““h”"):
        assert quoted(text) == extract_glyph_texts(text)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"prompt": "a" * 65}, "prompt: 74 tokens are over the model's 64"),
        ({"negative_prompt": "é" * 40}, "negative_prompt: 89 tokens are over the model's 64"),
        ({"prompt": f'a "{"é" * 130}"'}, "prompt: its texts in quotes are 270 tokens, over the 256"),
        ({"negative_prompt": f"“{'a' * 249}”"}, "negative_prompt: its texts in quotes are 259 tokens, over the 256"),
    ],
)
def test_a_text_that_would_be_cut_off_is_refused_by_driver_and_replica(
    configure: Callable[..., Config], splits: Load[Split], asked: dict[str, str], says: str
) -> None:
    request, config = ask(**asked), configure()
    with pytest.raises(RequestError) as caught:
        check_prompts(resolve(request, config)[0], config.model)
    assert str(caught.value).startswith(says)
    split = splits(THREE)
    job = split.submit(request)
    with pytest.raises(RequestError) as caught:
        split.run(job, "encoder")
    split.release(job)
    assert str(caught.value).startswith(says)


def test_quoted_texts_are_counted_where_the_model_is_not(configure: Callable[..., Config]) -> None:
    config = load_config(CONF / "hunyuan_video15.yaml")
    with pytest.raises(RequestError, match=r"^prompt: its texts in quotes are 259 tokens"):
        check_prompts(resolve(Request(f'"{"a" * 249}"'), config)[0], config.model)
    check_prompts(resolve(Request(f'"{"a" * 246}"'), config)[0], config.model)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"num_frames": 6}, "invalid num_frames=6: must be 4k + 1"),
        ({"height": 40}, "invalid height=40: must be a positive multiple of 16"),
        ({"width": 0}, "invalid width=0: must be a positive multiple of 16"),
        ({"height": 64, "width": 112}, "invalid height x width=7168: must be at most limits.max_pixels=6144"),
        ({"num_inference_steps": 0}, "invalid num_inference_steps=0"),
        ({"guidance_scale_2": 2.0}, "invalid guidance_scale_2=2.0: must be left out"),
        ({"audio_guidance_scale": 2.0}, "invalid audio_guidance_scale=2.0: must be left out"),
        ({"image": Image.new("RGB", (8, 8))}, "image: given, but a model of task t2v takes none"),
        ({"format": "png"}, "invalid format='png': must be one of mp4"),
    ],
)
def test_what_the_model_has_not_is_refused_by_name(configure: Any, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(ask(**asked), configure())
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.scheduler=unipc", "invalid model.scheduler"),
        ("model.task=vace", "invalid model.task='vace': must be one of t2v, i2v"),
        ("model.boundary_ratio=0.5", "invalid model.boundary_ratio"),
        ("stages.transformer.parallel.ulysses=2", "invalid stages.transformer.parallel.ulysses=2: must be left out"),
        ("stages.decoder.parallel.rows=2", "invalid stages.decoder.parallel.rows=2: must be left out"),
        ("stages.transformer.denoiser.attention=auto", "invalid stages.transformer.denoiser.attention"),
        ("stages.transformer.denoiser.fuse=true", "invalid stages.transformer.denoiser.fuse"),
        (
            "stages.transformer.denoiser.step_cache.method=first_block",
            "invalid stages.transformer.denoiser.step_cache.method='first_block'",
        ),
    ],
)
def test_what_does_not_work_yet_is_refused_by_key(configure: Any, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(override)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("transformer/config.json", {"in_channels": 33}, "transformer.in_channels of"),
        ("transformer/config.json", {"out_channels": 16}, "transformer.out_channels of"),
        ("transformer/config.json", {"text_embed_dim": 64}, "transformer.text_embed_dim of"),
        ("transformer/config.json", {"text_embed_2_dim": 64}, "transformer.text_embed_2_dim of"),
        ("transformer/config.json", {"patch_size": 2}, "a patch_size other than 1"),
        ("vae/config.json", {"spatial_compression_ratio": 8}, "vae.spatial_compression_ratio of"),
        ("vae/config.json", {"latent_channels": "8"}, "latent_channels in"),
        ("text_encoder_2/config.json", {"d_model": 2**40}, "d_model in"),
        ("guider/guider_config.json", {"guidance_rescale": 0.7}, "has guidance_rescale=0.7, which is not supported"),
        ("guider/guider_config.json", {"stop": 0.5}, "has stop=0.5, which is not supported"),
        ("model_index.json", {"guider": ["diffusers", "SkipLayerGuidance"]}, "must be one of ClassifierFreeGuidance"),
        ("model_index.json", {"tokenizer_2": ["transformers", "T5Tokenizer"]}, "must be one of ByT5Tokenizer"),
        ("model_index.json", {"_class_name": "HunyuanVideo15ImageToVideoPipeline"}, "which serves i2v"),
    ],
)
def test_other_models_are_refused_by_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    folder = copy_changed(checkpoint("tiny-hunyuan-video15"), tmp_path, file, changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(load_config(CONF / "tiny_hunyuan_video15.yaml", f"model.path={folder}", *SMALL).model)
    assert says in str(caught.value)


def test_a_text_has_no_more_tokens_than_the_model_was_made_for(configure: Any) -> None:
    with pytest.raises(CheckpointError, match=r"model.max_sequence_length: 1001 is over the 1000 tokens"):
        open_checkpoint(configure("model.max_sequence_length=1001").model)


def test_the_published_shape_has_the_published_sizes() -> None:
    modules = build_meta(SHAPES["hunyuan-video-1.5"])
    billions = {name: sum(p.numel() for p in module.parameters()) / 1e9 for name, module in modules.items()}
    assert billions["transformer"] == pytest.approx(8.3, rel=0.01)  # its name for it
    assert billions["text_encoder"] == pytest.approx(7.07, rel=0.01)  # Qwen2.5-VL 7B without its eyes
    assert billions["text_encoder_2"] == pytest.approx(0.22, rel=0.02)
    assert billions["vae"] == pytest.approx(1.25, rel=0.05)
