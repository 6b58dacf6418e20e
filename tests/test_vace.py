"""Wan 2.1 VACE makes stock's frames of a text, a control video, its mask and reference images, of any of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_parity import ONE, THREE, Load, Split, recut, start_splits

from disagg_ray import Request, load_config
from disagg_ray.config.schema import Config

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

    def __init__(self, folder: Path, images: dict[str, list[Image.Image]], dtype: Any = None) -> None:
        self.pipeline = diffusers.WanVACEPipeline.from_pretrained(folder, dtype=dtype or {"default": torch.float32})
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
def splits(configure: Callable[..., Config]) -> Iterator[Load[Split]]:
    """Give replicas that hand their tensors over with Mooncake, started once a cut."""
    yield from start_splits(lambda cut: recut(configure(), cut))


@pytest.fixture(scope="module")
def ask(files: dict[str, Any]) -> Callable[..., Request]:
    """Give a request with some of the inputs."""

    def make(given: tuple[str, ...] = (), **asked: Any) -> Request:
        return Request(**{name: files[name] for name in given} | PLAIN | asked, seed=7, format="npy")

    return make


@pytest.mark.parametrize("asked", [{}, UNGUIDED], ids=["guided", "unguided"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", [THREE, ONE])
def test_replicas_equal_stock(
    splits: Load[Split], ask: Any, stock: Stock, cut: str, case: str, asked: dict[str, Any]
) -> None:
    """Of seven frames five count, or all, and stock fills up to nine."""
    split, given = splits(cut), CASES[case]
    assert np.array_equal(split.generate(ask(given, **asked)), stock.frames(given, **PLAIN | asked))
    assert split.bytes_in_use() == {}
