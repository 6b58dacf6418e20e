"""HunyuanVideo 1.5 from a first frame: frames equal stock's bit for bit, split and fused, whatever the image's size."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from helpers import copy_changed, wait_until_empty
from PIL import Image
from splits import FOUR, ONE, THREE, Load, Split

from disagg_ray import CheckpointError, LocalPipeline, Pipeline, Request, RequestError, load_config
from disagg_ray.config.schema import Config
from disagg_ray.config.stages import StageConfig
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.hunyuan_video15.random import build_meta
from disagg_ray.models.hunyuan_video15.shapes import SHAPES
from disagg_ray.models.random import make_checkpoint
from disagg_ray.request import resolve

CONF = Path(__file__).parents[1] / "conf"
SHAPE = "tiny-hunyuan-video15-i2v"
SMALL = ("model.max_sequence_length=64", "limits.max_frames=17")
PLAIN: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "blurry", "image": (190, 130), "num_frames": 9,
    "num_inference_steps": 3, "guidance_scale": 6.0, "seed": 7,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided, long": {"guidance_scale": 1.0, "prompt": 'a "b"', "image": (20, 333), "num_frames": 5},
    "of another aspect than the image": {"height": 32, "width": 48, "num_frames": 1, "num_inference_steps": 1},
}
"""What differs from `PLAIN`; images are (width, height) here."""
FEW = {"num_frames": 1, "num_inference_steps": 2}
PROCESSOR = "feature_extractor/preprocessor_config.json"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configure(checkpoint: Callable[[str], Path]) -> Callable[..., Config]:
    """Give the tiny model's configuration with some overrides."""
    model = f"model.path={checkpoint(SHAPE)}"
    return lambda *overrides: load_config(CONF / "tiny_hunyuan_video15_i2v.yaml", model, *SMALL, *overrides)


def load_stock(folder: Path, dtype: Any = torch.float32, tiles: bool = False) -> Callable[[Request], np.ndarray]:
    """Return what makes a request's frames with the stock pipeline."""
    stock = diffusers.HunyuanVideo15ImageToVideoPipeline.from_pretrained(folder, dtype=dtype)
    stock.set_progress_bar_config(disable=True)
    stock.tokenizer_max_length = 64
    if tiles:
        stock.vae.enable_tiling()

    def make(request: Request) -> np.ndarray:
        stock.video_processor = HunyuanVideo15ImageProcessor(do_resize=False)
        if request.height is not None:  # stock takes no size
            size = request.height, request.width
            stock.video_processor.calculate_default_height_width = lambda **_: size
        stock.guider = diffusers.ClassifierFreeGuidance(guidance_scale=request.guidance_scale)
        names = ("prompt", "negative_prompt", "image", "num_frames", "num_inference_steps")
        asked = {name: getattr(request, name) for name in names}
        generator = torch.Generator("cpu").manual_seed(request.seed)
        frames: np.ndarray = stock(**asked, generator=generator, output_type="np").frames[0]
        return frames

    return make


@pytest.fixture(scope="module")
def expect(checkpoint: Callable[[str], Path], ask: Callable[..., Request]) -> Callable[[str], np.ndarray]:
    """Give the stock pipeline's frames of a case."""
    stock = load_stock(checkpoint(SHAPE))
    return cache(lambda case: stock(ask(case)))


PROOF = pytest.mark.proof


@pytest.mark.parametrize("cut", [THREE, pytest.param(FOUR, marks=PROOF), pytest.param(ONE, marks=PROOF)])
def test_replicas_equal_stock(splits: Load[Split], ask: Any, expect: Callable[[str], np.ndarray], cut: str) -> None:
    split = splits(cut)
    for case in CASES:
        assert np.array_equal(split.generate(ask(case)), expect(case)), case
    assert split.bytes_in_use() == {}


@pytest.mark.proof
def test_one_process_equals_stock_after_its_stages_warmed_up(configure: Any, ask: Any, expect: Any) -> None:
    warm = [f"stages.{stage}.warm_up=[[16,16,5]]" for stage in ("encoder", "transformer", "decoder")]
    with LocalPipeline(configure(*warm)) as local:
        for case in CASES:
            assert np.array_equal(local.generate(ask(case)).frames, expect(case)), case


@pytest.mark.proof
def test_an_image_is_cropped_alike_by_encoders_in_stages_of_their_own(configure: Any, ask: Any, expect: Any) -> None:
    config = configure()
    one, two = ([*blocks] for blocks in (config.stages["encoder"].blocks[:2], config.stages["encoder"].blocks[2:]))
    stages = {"seen": StageConfig(blocks=one), "latents": StageConfig(blocks=two)}
    rest = {name: config.stages[name] for name in ("transformer", "decoder")}
    with LocalPipeline(replace(config, stages=stages | rest)) as local:
        made = local.generate(ask("of another aspect than the image")).frames
    assert np.array_equal(made, expect("of another aspect than the image"))


@pytest.mark.proof
def test_every_part_of_a_request_shows(checkpoint: Any, ask: Any, image: Any) -> None:
    fields = [{}, {"guidance_scale": 1.0}, {"prompt": '"a"'}, {"negative_prompt": "0"}, {"image": image(190, 130)}]
    stock = load_stock(checkpoint(SHAPE))
    assert len({stock(ask(**FEW, **asked)).tobytes() for asked in fields}) == len(fields)


def test_bfloat16_and_tiles_equal_stock_s(checkpoint: Any, configure: Any, ask: Any) -> None:
    dtypes = "model.dtype={text_encoder: bfloat16, image_encoder: bfloat16, transformer: bfloat16, vae: bfloat16}"
    tiles = [f"stages.{stage}.vae.tile_pixels=0" for stage in ("encoder", "decoder")]
    request = ask(height=272, width=288, **FEW)
    with LocalPipeline(configure(dtypes, *tiles, "limits.max_pixels=78336")) as local:
        made = local.generate(request).frames
    assert np.array_equal(made, load_stock(checkpoint(SHAPE), torch.bfloat16, tiles=True)(request))


@pytest.mark.proof
def test_each_encoder_s_precision_is_its_own(checkpoint: Any, configure: Any, ask: Any) -> None:
    mixed = {"image_encoder": torch.bfloat16, "vae": torch.bfloat16, "default": torch.float32}
    with LocalPipeline(configure("model.dtype={image_encoder: bfloat16, vae: bfloat16}")) as local:
        made = local.generate(ask(**FEW)).frames
    assert np.array_equal(made, load_stock(checkpoint(SHAPE), mixed)(ask(**FEW)))


@pytest.mark.proof
def test_a_model_distilled_to_few_steps_equals_stock(ask: Any, tmp_path: Path) -> None:
    shape = SHAPES[SHAPE]
    SHAPES["few"] = replace(shape, name="few", transformer=replace(shape.transformer, use_meanflow=True))
    try:
        folder = make_checkpoint("few", tmp_path / "few")
    finally:
        del SHAPES["few"]
    config = load_config(CONF / "tiny_hunyuan_video15_i2v.yaml", f"model.path={folder}", *SMALL)
    with LocalPipeline(config) as local:
        made = local.generate(ask(**FEW)).frames
    assert np.array_equal(made, load_stock(folder)(ask(**FEW)))


@pytest.mark.proof
def test_a_pipeline_on_ray_equals_stock(cluster: None, configure: Any, ask: Any, expect: Any, tmp_path: Path) -> None:
    with Pipeline(configure()) as pipeline:
        pipeline.generate(ask()).save(tmp_path / "a.npy")
        wait_until_empty(pipeline, 30)
    assert np.array_equal(np.load(tmp_path / "a.npy"), expect("guided"))


@pytest.mark.parametrize("target", [48, 64, 640, 960])
def test_a_size_that_is_left_out_is_stock_s_for_the_image(configure: Any, target: int) -> None:
    find = HunyuanVideo15ImageProcessor().calculate_default_height_width
    sides = [f"defaults.height={target}", f"defaults.width={target}", "limits.max_pixels=1000000"]
    config = configure(*sides, "limits.max_image_pixels=9000000")
    for width, height in (
        (64, 64),
        (65, 64),
        (64, 65),
        (848, 480),
        (480, 848),
        (1920, 1080),
        (90, 900),
        (900, 9),
        (3, 2),
    ):
        request, _ = resolve(Request("a", image=Image.new("RGB", (width, height))), config)
        assert (request.height, request.width) == find(height=height, width=width, target_size=target), (width, height)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"image": None}, "image: none given; a model of task i2v needs one"),
        ({"image": Image.new("RGB", (1010, 10))}, "invalid image='1010x10': must be at most 100 times as long as"),
        ({"image": Image.new("RGB", (2049, 2048))}, "image: the image has 2049x2048 pixels, not from 1 to limits"),
        ({"last_image": Image.new("RGB", (8, 8))}, "last_image: given, but a model of task i2v takes none"),
        ({"height": 40}, "invalid height=40: must be a positive multiple of 16"),
        ({"num_frames": 6}, "invalid num_frames=6: must be 4k + 1"),
        ({"guidance_scale_2": 2.0}, "invalid guidance_scale_2=2.0: must be left out"),
    ],
)
def test_what_the_model_has_not_is_refused_by_name(configure: Any, ask: Any, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(ask(**asked), configure())
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(64)])
def test_a_file_that_is_no_image_is_refused(configure: Any, ask: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(RequestError, match=r"^image: "):
        resolve(ask(image=tmp_path / "a.png"), configure())


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("image_encoder/config.json", {"hidden_size": 32}, "transformer.image_embed_dim of"),
        ("image_encoder/config.json", {"num_hidden_layers": 2**20}, "num_hidden_layers in"),
        ("image_encoder/config.json", {"image_size": 64}, "makes images of another size than the 64 x 64 pixels"),
        (PROCESSOR, {"size": {"height": 2**20, "width": 32}}, "of another size than the 32 x 32 pixels"),
        (PROCESSOR, {"size": 32}, "of another size than the 32 x 32 pixels"),
        (
            PROCESSOR,
            {"do_pad": True, "pad_size": {"height": 2**20, "width": 2**20}},
            "neither do_center_crop nor do_pad",
        ),
        (PROCESSOR, {"auto_map": {"AutoImageProcessor": "x.Y"}}, "which is never run"),
        (
            "model_index.json",
            {"image_encoder": ["transformers", "CLIPVisionModel"]},
            "must be one of SiglipVisionModel",
        ),
        ("model_index.json", {"_class_name": "HunyuanVideo15Pipeline"}, "which serves t2v"),
    ],
)
def test_other_models_are_refused_by_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    folder = copy_changed(checkpoint(SHAPE), tmp_path, file, changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(load_config(CONF / "tiny_hunyuan_video15_i2v.yaml", f"model.path={folder}", *SMALL).model)
    assert says in str(caught.value)


def test_the_published_shape_has_the_published_sizes() -> None:
    seen = build_meta(SHAPES["hunyuan-video-1.5-i2v"])["image_encoder"]
    assert sum(p.numel() for p in seen.parameters()) / 1e6 == pytest.approx(
        428, rel=0.01
    )  # SigLIP SO400M with its head
    assert seen.embeddings.position_embedding.num_embeddings == 729  # as many as stock makes zeros where there is none
