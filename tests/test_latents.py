"""Latents in files: read back whole and for the same request and model, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from disagg_ray import Request, load_config
from disagg_ray.errors import OutputError
from disagg_ray.latents import describe, read_latents, write_latents
from disagg_ray.request import resolve

CONFIG = load_config("conf/tiny_t2v.yaml")
REQUEST = resolve(Request("a red circle", seed=5), CONFIG)[0]
ABOUT = describe(REQUEST, CONFIG)
TENSORS = {"latents": torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))}


def test_latents_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "work" / "latents"
    write_latents(path, TENSORS, ABOUT)
    found = read_latents(path, ABOUT)
    assert found is not None and torch.equal(found["latents"], TENSORS["latents"])
    assert [file.name for file in path.parent.iterdir()] == ["latents"]


@pytest.mark.parametrize("place", [0.2, 0.6, 0.99])
def test_a_file_with_one_changed_byte_is_not_used(tmp_path: Path, place: float) -> None:
    path = tmp_path / "latents"
    write_latents(path, TENSORS, ABOUT)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert read_latents(path, ABOUT) is None


@pytest.mark.parametrize("content", [b"", b"no safetensors", bytes(1000)])
def test_a_file_of_another_kind_is_not_used(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "latents"
    path.write_bytes(content)
    assert read_latents(path, ABOUT) is None


@pytest.mark.parametrize("change", [{"seed": 6}, {"prompt": "a blue circle"}, {"num_inference_steps": 3}])
def test_latents_of_another_request_are_not_used(tmp_path: Path, change: dict[str, int | str]) -> None:
    path = tmp_path / "latents"
    write_latents(path, TENSORS, ABOUT)
    assert read_latents(path, describe(replace(REQUEST, **change), CONFIG)) is None


def test_latents_of_another_model_are_not_used_and_of_the_same_under_another_id_are(tmp_path: Path) -> None:
    path = tmp_path / "latents"
    write_latents(path, TENSORS, ABOUT)
    other = replace(CONFIG, model=replace(CONFIG.model, path="random:tiny-t2v"))
    assert read_latents(path, describe(REQUEST, other)) is None
    assert read_latents(path, describe(replace(REQUEST, id="another", priority=3), CONFIG)) is not None


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="latents could not be written"):
        write_latents(tmp_path / "file" / "latents", TENSORS, ABOUT)
