"""Wan 2.2 TI2V: one checkpoint makes stock's frames of text alone and of a first frame."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_parity import HOST, ONE, THREE, Load, Split, recut

from disagg_ray import Request, load_config
from disagg_ray.config.schema import Config, TransportConfig
from disagg_ray.transfer.pool import Pool

CONF = Path(__file__).parents[1] / "conf"
SMALL = ("model.max_sequence_length=64", "limits.max_pixels=9216", "limits.max_frames=9")
PLAIN: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "blurry", "height": 64, "width": 96, "num_frames": 5,
    "num_inference_steps": 3, "guidance_scale": 5.0,
}  # fmt: skip
UNGUIDED: dict[str, Any] = {"guidance_scale": 1.0, "height": 96, "width": 64, "num_frames": 9, "prompt": "two"}
CASES = [(text, image) for text in ({}, UNGUIDED) for image in (None, (190, 130))]
NAMES = ["text, guided", "image, guided", "text, unguided", "image, unguided"]

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


@pytest.fixture(scope="module")
def stock(checkpoint: Callable[[str], Path]) -> Callable[..., np.ndarray]:
    """Give the frames of the two stock pipelines, which share the components of one checkpoint."""
    text = diffusers.WanPipeline.from_pretrained(checkpoint("tiny-ti2v"), dtype={"default": torch.float32})
    image = diffusers.WanImageToVideoPipeline(**text.components, expand_timesteps=True)
    for pipeline in (text, image):
        pipeline.set_progress_bar_config(disable=True)

    def run(**asked: Any) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(7)
        made: np.ndarray = (image if "image" in asked else text)(
            **asked, generator=generator, max_sequence_length=64
        ).frames[0]
        return made

    return run


@pytest.fixture(scope="module")
def splits(configure: Callable[..., Config]) -> Iterator[Load[Split]]:
    """Give replicas that hand their tensors over with Mooncake, started once a cut."""
    pool = Pool("driver", 2**22, HOST, TransportConfig())
    closing: list[Any] = [pool]

    @cache
    def start(cut: str) -> Split:
        split = Split(recut(configure(), cut), pool)
        closing.extend(split.replicas.values())
        return split

    yield start
    for part in closing:
        part.close()


def ask(**asked: Any) -> Request:
    return Request(**asked, seed=7, format="npy")


@pytest.mark.parametrize(("case", "size"), CASES, ids=NAMES)
@pytest.mark.parametrize("cut", [THREE, ONE])
def test_replicas_equal_stock(
    splits: Load[Split], arguments: Any, stock: Any, cut: str, case: dict[str, Any], size: tuple[int, int] | None
) -> None:
    asked, split = arguments(case, size), splits(cut)
    assert np.array_equal(split.generate(ask(**asked)), stock(**asked))
    assert split.bytes_in_use() == {}
