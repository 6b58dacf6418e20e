"""Qwen-Image-Edit-Plus: images of one image and of several equal stock's bit for bit, split and fused."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from edit_stock import load_stock
from helpers import copy_changed, wait_until_empty
from PIL import Image
from splits import ONE, THREE, Load, Split
from transformers import AutoImageProcessor

from disagg_ray import CheckpointError, LocalPipeline, Pipeline, Request, RequestError, load_config
from disagg_ray.cli.command import main
from disagg_ray.config.schema import Config
from disagg_ray.doctor.service import make_request
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.models.prompts import check_prompts
from disagg_ray.models.qwen_image.edit_plus_text import prepare
from disagg_ray.models.qwen_image.random import make_tokenizer
from disagg_ray.request import check, resolve

CONF = Path(__file__).parents[1] / "conf"
TINY = "tiny-qwen-image-edit-plus"
PLAIN: dict[str, Any] = {
    "prompt": "put both on a table", "negative_prompt": "blurry", "reference_images": [(90, 160), (190, 130)],
    "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 7,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "two images": {},
    "one image, unguided": {"reference_images": [(190, 130)], "guidance_scale": 1.0, "prompt": "one"},
    "three images, of another aspect than any": {
        "reference_images": [(64, 64), (300, 40), (40, 300)], "height": 48, "width": 96,
        "negative_prompt": "", "prompt": "{b} 红色的圆",
    },
    "one side given, unguided": {"height": 80, "guidance_scale": 1.0, "seed": 2**63 - 1},
}  # fmt: skip
"""What differs from `PLAIN`; images are (width, height) here."""
PUBLISHED = {"2511": {}, "2509": {"zero_cond_t": False}}
"""What differs in the transformer's configuration of the published models."""

STOCK = "QwenImageEditPlusPipeline"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configure(checkpoint: Callable[[str], Path]) -> Callable[..., Config]:
    """Give the tiny model's configuration with some overrides."""
    model = f"model.path={checkpoint(TINY)}"
    return lambda *overrides: load_config(CONF / "tiny_qwen_image_edit_plus.yaml", model, *overrides)


@pytest.fixture(scope="module")
def ask(image: Callable[..., Image.Image]) -> Callable[..., Request]:
    """Give a case's request with some changes."""

    def make(case: str = "two images", **asked: Any) -> Request:
        fields = PLAIN | CASES[case] | {"format": "npy"}
        images = [image(*sides, seed=number) for number, sides in enumerate(fields["reference_images"])]
        return Request(**(fields | {"reference_images": images} | asked))

    return make


@pytest.fixture(scope="module")
def expect(checkpoint: Callable[[str], Path], ask: Callable[..., Request]) -> Callable[[str], np.ndarray]:
    """Give the stock pipeline's image of a case."""
    stock = load_stock(STOCK, checkpoint(TINY))
    return cache(lambda case: stock(ask(case)))


SLOW, PROOF = pytest.mark.slow, pytest.mark.proof


@pytest.mark.parametrize(
    ("cut", "case"),
    [
        pytest.param(cut, case, marks=SLOW if (cut, case) == (THREE, "two images") else PROOF)
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
        images = ask().reference_images
        assert images is not None
        alike: dict[str, Any] = {"guidance_scale": 1.0, "height": 48, "width": 64}
        turned, straight = (local.generate(ask(reference_images=each, **alike)) for each in (images[::-1], images))
        assert not np.array_equal(turned.frames, straight.frames), "the order of images counts"


@pytest.mark.proof
def test_several_images_are_edited_through_ray(
    cluster: None, configure: Callable[..., Config], ask: Callable[..., Request], expect: Callable[[str], np.ndarray]
) -> None:
    with Pipeline(configure()) as pipeline:
        handles = {case: pipeline.submit(ask(case)) for case in CASES}
        for case, handle in handles.items():
            assert np.array_equal(handle.result(300).frames, expect(case)), case
        wait_until_empty(pipeline, 30)


@pytest.mark.proof
@pytest.mark.parametrize("published", PUBLISHED)
def test_bfloat16_equals_stock_s_of_each_published_model(
    checkpoint: Callable[[str], Path], ask: Callable[..., Request], tmp_path: Path, published: str
) -> None:
    folder = copy_changed(checkpoint(TINY), tmp_path, "transformer/config.json", PUBLISHED[published])
    dtypes = "model.dtype={text_encoder: bfloat16, transformer: bfloat16, vae: bfloat16}"
    config = load_config(CONF / "tiny_qwen_image_edit_plus.yaml", f"model.path={folder}", dtypes)
    with LocalPipeline(config) as local:
        assert np.array_equal(local.generate(ask()).frames, load_stock(STOCK, folder, torch.bfloat16)(ask()))


@pytest.mark.parametrize("sides", [(1024, 1024), (1920, 1080), (333, 100), (100, 7000), (1, 1)])
def test_sizes_that_follow_from_the_last_image_are_stock_s(
    configure: Callable[..., Config], sides: tuple[int, int]
) -> None:
    config = configure("defaults.height=1024", "defaults.width=1024", "limits.max_pixels=1200000")
    images = [Image.new("RGB", (30, 40)), Image.new("RGB", sides)]
    request, _ = resolve(Request("a", reference_images=list(images)), config)
    assert (request.width, request.height) == calculate_dimensions(1024 * 1024, sides[0] / sides[1])


GREY = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"reference_images": None}, "reference_images: none given; a model of task edit_plus needs one"),
        ({"reference_images": []}, "invalid reference_images=[]: must be a list of 1 to 4 images"),
        ({"reference_images": [GREY] * 5}, "invalid reference_images=["),
        ({"reference_images": GREY}, "invalid reference_images=<PIL"),
        ({"reference_images": [GREY, "gone.png"]}, "reference_images[1]: 'gone.png' is not a file"),
        (
            {"reference_images": [GREY, Image.new("RGB", (1010, 10)), GREY]},
            "invalid reference_images[1]='1010x10': must be at most 100 times as long as",
        ),
        (
            {"reference_images": None, "image": GREY},
            "image: given, but a model of task edit_plus takes none; give reference_images or use another model",
        ),
        ({"image": GREY}, "image: given, but a model of task edit_plus takes none; leave it out or use another model"),
        ({"mask": GREY}, "mask: given, but a model of task edit_plus takes none"),
        ({"conditioning_scale": 0.5}, "conditioning_scale: given, but a model of task edit_plus takes none"),
        ({"height": 40}, "invalid height=40: must be a positive multiple of 16"),
        ({"fps": 8}, "invalid fps=8: must be left out: models of model.family=qwen_image make images"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_name(
    configure: Callable[..., Config], ask: Callable[..., Request], asked: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(ask(**asked), configure())
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_a_text_is_counted_after_the_first_image_s_number(
    configure: Callable[..., Config], ask: Callable[..., Request]
) -> None:
    config = configure("model.max_sequence_length=300")
    room = 300 - (len(make_tokenizer()(prepare("")).input_ids) - 64)
    check_prompts(check(ask(prompt="x" * room), config), config.model)
    with pytest.raises(RequestError, match=r"^prompt: 301 tokens are over the model's 300"):
        check_prompts(check(ask(prompt="x" * (room + 1)), config), config.model)


@pytest.mark.parametrize("sides", [(64, 64), (1000, 10), (10, 1000), (3, 299)])
def test_pools_have_room_for_what_is_seen_of_four_images(
    checkpoint: Callable[[str], Path], configure: Callable[..., Config], tmp_path: Path, sides: tuple[int, int]
) -> None:
    sizes = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    folder = copy_changed(checkpoint(TINY), tmp_path, "processor/preprocessor_config.json", sizes)
    geometry = open_checkpoint(replace(configure().model, path=str(folder))).geometry
    (wide, high), (width, height) = (calculate_dimensions(n**2, sides[0] / sides[1]) for n in (1024, 384))
    tokens = AutoImageProcessor.from_pretrained(folder / "processor").get_number_of_image_patches(height, width) // 4
    marks = len(make_tokenizer()("Picture 4: <|vision_start|><|vision_end|>").input_ids)
    room = geometry.tensor_bytes(64 * 64, 1, 1000)
    assert room["prompt_embeds"] >= 4 * 32 * (4 * (tokens + marks) + 511)
    assert room["packed_image_latents"] >= 4 * (4 * 16 * wide * high // 64)
    assert room["reference_images"] == 4 * 3000


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("processor/preprocessor_config.json", {"min_pixels": 200_000}, "and must of 784 to 147456 at the least"),
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "which serves edit"),
    ],
)
def test_other_models_are_refused_by_name(
    checkpoint: Callable[[str], Path], configure: Callable[..., Config], tmp_path: Path,
    file: str, changes: dict[str, Any], says: str,
) -> None:  # fmt: skip
    folder = copy_changed(checkpoint(TINY), tmp_path, file, changes)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(replace(configure().model, path=str(folder)))
    assert says in str(caught.value)


def test_the_doctor_s_request_fits(configure: Callable[..., Config]) -> None:
    request, images = resolve(make_request(configure()), configure())
    assert (request.num_references, set(images)) == (1, {"reference_images"})


@pytest.fixture
def generate(configure: Callable[..., Config], image: Callable[..., Image.Image], tmp_path: Path) -> Callable[..., int]:
    """Run the command with some of the files a.png, b.png and text.png; it writes made.png."""
    image(90, 60).save(tmp_path / "a.png")
    image(60, 90, 1).save(tmp_path / "b.png")
    (tmp_path / "text.png").write_text("no image")
    given = [str(CONF / "tiny_qwen_image_edit_plus.yaml"), f"model.path={configure().model.path}", "--local", "--quiet"]
    asked = ["--prompt", "a", "--seed", "1", "--output", str(tmp_path / "made.png")]

    def run(*files: str) -> int:
        references = [word for name in files for word in ("--reference-images", str(tmp_path / name))]
        return main(["generate", "--config", *given, *asked, *references, "defaults.num_inference_steps=2"])

    return run


@pytest.mark.proof
def test_the_command_edits_files(generate: Callable[..., int], tmp_path: Path) -> None:
    assert generate("a.png", "b.png") == 0
    assert Image.open(tmp_path / "made.png").size == (64, 64)


@pytest.mark.parametrize("name", ["text.png", "gone.png", "."])
def test_the_command_names_a_file_that_is_no_image(
    generate: Callable[..., int], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("a.png", name) == 2
    said = capsys.readouterr().err
    assert "reference_images[1]: " in said and said.count("\n") == 1
