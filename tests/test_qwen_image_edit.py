"""Qwen-Image-Edit: images equal stock's bit for bit, split and fused, whatever the size of the given image."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from edit_stock import load_stock
from helpers import copy_changed, wait_until_empty
from PIL import Image
from splits import ONE, THREE, Load, Split
from transformers import AutoImageProcessor

from disagg_ray import CheckpointError, LocalPipeline, Pipeline, Request, RequestError, load_config
from disagg_ray.config.schema import Config
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.geometry import Geometry
from disagg_ray.models.prompts import check_prompts
from disagg_ray.request import check, resolve

CONF = Path(__file__).parents[1] / "conf"
PROCESSOR = "processor/preprocessor_config.json"
PLAIN: dict[str, Any] = {
    "prompt": "make it red", "negative_prompt": "blurry", "image": (190, 130), "num_inference_steps": 2,
    "guidance_scale": 4.0, "seed": 7,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided, tall": {"guidance_scale": 1.0, "prompt": "two", "image": (90, 700)},
    "of another aspect than the image": {"height": 48, "width": 96, "negative_prompt": "", "prompt": "{b} 红色的圆"},
    "one side given": {"height": 80, "image": (1500, 900), "guidance_scale": 1.0, "seed": 2**63 - 1},
}
"""What differs from `PLAIN`; images are (width, height) here."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configure(checkpoint: Callable[[str], Path]) -> Callable[..., Config]:
    """Give the tiny model's configuration with some overrides."""
    model = f"model.path={checkpoint('tiny-qwen-image-edit')}"
    return lambda *overrides: load_config(CONF / "tiny_qwen_image_edit.yaml", model, *overrides)


@pytest.fixture(scope="module")
def expect(checkpoint: Callable[[str], Path], ask: Callable[..., Request]) -> Callable[..., np.ndarray]:
    """Give the stock pipeline's image of a case."""
    load = cache(partial(load_stock, "QwenImageEditPipeline", checkpoint("tiny-qwen-image-edit")))
    return cache(lambda case, dtype=torch.float32: load(dtype)(ask(case)))


SLOW, PROOF = pytest.mark.slow, pytest.mark.proof


@pytest.mark.parametrize(
    ("cut", "case"),
    [
        pytest.param(cut, case, marks=SLOW if (cut, case) == (THREE, "guided") else PROOF)
        for cut in (THREE, ONE)
        for case in CASES
    ],
)
def test_replicas_equal_stock(
    splits: Load[Split], ask: Callable[..., Request], expect: Callable[[str], np.ndarray], cut: str, case: str
) -> None:
    split = splits(cut)
    assert np.array_equal(split.generate(ask(case)), expect(case))
    assert split.bytes_in_use() == {}


@pytest.mark.proof
def test_one_process_equals_stock_and_keeps_what_it_encoded(
    configure: Callable[..., Config], ask: Callable[..., Request], expect: Callable[[str], np.ndarray]
) -> None:
    warm = [f"stages.{stage}.warm_up=[[32,64,1]]" for stage in ("encoder", "transformer", "decoder")]
    with LocalPipeline(configure(*warm)) as local:
        for case in CASES:
            assert np.array_equal(local.generate(ask(case)).frames, expect(case)), case


@pytest.mark.slow
def test_bfloat16_equals_stock(
    configure: Callable[..., Config], ask: Callable[..., Request], expect: Callable[..., np.ndarray]
) -> None:
    dtypes = "model.dtype={text_encoder: bfloat16, transformer: bfloat16, vae: bfloat16}"
    with LocalPipeline(configure(dtypes)) as local:
        made = local.generate(ask("of another aspect than the image")).frames
    assert np.array_equal(made, expect("of another aspect than the image", torch.bfloat16))


@pytest.mark.proof
def test_an_image_is_edited_through_ray(
    cluster: None, configure: Callable[..., Config], ask: Callable[..., Request], expect: Callable[[str], np.ndarray]
) -> None:
    with Pipeline(configure()) as pipeline:
        assert np.array_equal(pipeline.generate(ask()).frames, expect("guided"))
        other = pipeline.generate(ask(image=Image.new("RGB", (190, 130)))).frames  # the same texts of another image
        assert not np.array_equal(other, expect("guided"))
        wait_until_empty(pipeline, 30)


@pytest.mark.parametrize("sides", [(1024, 1024), (1920, 1080), (640, 960), (333, 100), (100, 7000), (1, 1)])
def test_sizes_that_follow_from_an_image_are_stock_s(configure: Callable[..., Config], sides: tuple[int, int]) -> None:
    area = ["defaults.height=1024", "defaults.width=1024", "limits.max_pixels=1200000"]
    request, _ = resolve(Request("a", image=Image.new("RGB", sides)), configure(*area))
    assert (request.width, request.height, None) == calculate_dimensions(1024 * 1024, sides[0] / sides[1])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"image": None}, "image: none given; a model of task edit needs one"),
        (
            {"image": None, "reference_images": ["a.png"]},
            "reference_images: given, but a model of task edit takes none; "
            "give image or use another model (edit_plus of qwen_image, vace of wan)",
        ),
        ({"last_image": Image.new("RGB", (8, 8))}, "last_image: given, but a model of task edit takes none"),
        ({"image": Image.new("RGB", (1010, 10))}, "invalid image='1010x10': must be at most 100 times as long as"),
        ({"image": Image.new("RGB", (2049, 2048))}, "image: the image has 2049x2048 pixels, not from 1 to limits"),
        ({"height": 40}, "invalid height=40: must be a positive multiple of 16"),
        ({"height": 512, "width": 256}, "invalid height x width=131072: must be at most limits.max_pixels=65536"),
        ({"num_frames": 5}, "invalid num_frames=5: must be left out: models of model.family=qwen_image make images"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_name(
    configure: Callable[..., Config], ask: Callable[..., Request], asked: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(ask(**asked), configure())
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("mark", ["<|image_pad|>", "<|video_pad|>"])
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_text_with_a_mark_of_the_model_is_refused(
    configure: Callable[..., Config], ask: Callable[..., Request], field: str, mark: str
) -> None:
    config = configure()
    with pytest.raises(RequestError, match=rf"^{field}: it holds {mark.replace('|', '.')}, which marks"):
        check_prompts(check(ask(**{field: f"a {mark}"}), config), config.model)


def geometry_of(folder: Path) -> Geometry:
    return open_checkpoint(load_config(CONF / "tiny_qwen_image_edit.yaml", f"model.path={folder}").model).geometry


@pytest.mark.parametrize("sides", [(64, 64), (190, 130), (1000, 10), (10, 1000), (3, 299)])
@pytest.mark.parametrize("most", [3136, 12544, 12845056])
def test_pools_have_room_for_what_is_seen_of_any_image(
    checkpoint: Callable[[str], Path], tmp_path: Path, sides: tuple[int, int], most: int
) -> None:
    sizes = {"size": {"shortest_edge": 3136, "longest_edge": most}}
    folder = copy_changed(checkpoint("tiny-qwen-image-edit"), tmp_path, PROCESSOR, sizes)
    width, height, _ = calculate_dimensions(1024 * 1024, sides[0] / sides[1])
    processor = AutoImageProcessor.from_pretrained(folder / "processor")
    tokens = processor.get_number_of_image_patches(height, width) // 4
    room = geometry_of(folder).tensor_bytes(64 * 64, 1, 0)
    assert room["prompt_embeds"] >= 4 * 32 * (tokens + 511)
    assert room["packed_image_latents"] >= 4 * 16 * width * height // 64


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (PROCESSOR, {"patch_size": 16}, "has patch_size=16, and its text encoder wants 14"),
        (PROCESSOR, {"merge_size": 2**30}, "merge_size in "),
        (PROCESSOR, {"min_pixels": 2**40}, "and must of 784 to 1048576 at the least"),
        (PROCESSOR, {"auto_map": {"AutoImageProcessor": "x.Y"}}, "which is never run"),
        ("model_index.json", {"processor": ["transformers", "AutoProcessor"]}, "and must be one of Qwen2VLProcessor"),
        ("model_index.json", {"_class_name": "QwenImagePipeline"}, "model.task: 'edit' does not fit"),
        ("model_index.json", {"_class_name": "QwenImageEditPlusPipeline"}, "which serves edit_plus"),
        ("model_index.json", {"_class_name": "QwenImageLayeredPipeline"}, "; known are "),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
    ],
)
def test_other_models_are_refused_by_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    folder = copy_changed(checkpoint("tiny-qwen-image-edit"), tmp_path, file, changes)
    with pytest.raises(CheckpointError) as caught:
        geometry_of(folder)
    assert says in str(caught.value)
