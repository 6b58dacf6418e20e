"""Latents in files: read back whole, finite, and for the same request and model, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from disagg_ray import Request, load_config
from disagg_ray.driver.latents import Wanted, describe, read_latents, write_latents
from disagg_ray.errors import OutputError
from disagg_ray.request import resolve

CONFIG = load_config("conf/tiny_t2v.yaml")
REQUEST = resolve(Request("a red circle", seed=5), CONFIG)[0]
BLOCKS = {"text_encoder": "1f", "denoise": "2f"}
ABOUT = describe(REQUEST, BLOCKS)
SHAPE = (1, 16, 2, 4, 4)
WANTED = Wanted(REQUEST, {"text_encoder": {"1f"}, "denoise": {"2f", "3f"}}, SHAPE)
LATENTS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of latents."""
    write_latents(tmp_path / "work" / "latents", LATENTS, ABOUT)
    return tmp_path / "work" / "latents"


def test_latents_come_back_bit_for_bit(path: Path) -> None:
    found = read_latents(path, WANTED)
    assert found is not None
    assert torch.equal(found, LATENTS)
    assert [file.name for file in path.parent.iterdir()] == ["latents"]


@pytest.mark.parametrize("place", [0.2, 0.6, 0.99])
def test_a_file_with_one_changed_byte_is_not_used(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert read_latents(path, WANTED) is None


HEADERS = [b"", b"no safetensors", bytes(1000), b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"[]"]


@pytest.mark.parametrize("content", [*HEADERS, (9000).to_bytes(8, "little") + b"[" * 9000])
def test_a_file_of_another_kind_is_not_used(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(content)
    assert read_latents(path, WANTED) is None
    assert "computing them again" in caplog.text


@pytest.mark.parametrize("change", [{"seed": 6}, {"prompt": "a blue circle"}, {"num_inference_steps": 3}])
def test_latents_of_another_request_are_not_used(path: Path, change: dict[str, int | str]) -> None:
    assert read_latents(path, replace(WANTED, request=replace(REQUEST, **change))) is None  # type: ignore[arg-type]


OTHERS: list[dict[str, set[str]]] = [
    {"denoise": {"2f"}},
    {"text_encoder": {"1f"}, "denoise": {"4f"}},
    {"text_encoder": set(), "denoise": {"2f"}},
]


@pytest.mark.parametrize("blocks", OTHERS)
def test_latents_that_other_blocks_made_are_not_used(path: Path, blocks: dict[str, set[str]]) -> None:
    assert read_latents(path, replace(WANTED, blocks=blocks)) is None


def test_latents_of_the_same_request_under_another_id_are_used(path: Path) -> None:
    assert read_latents(path, replace(WANTED, request=replace(REQUEST, id="another", priority=3, fps=8))) is not None


STRANGE = {
    "another shape": torch.zeros(1, 16, 2, 4, 8),
    "as many numbers": torch.zeros(1, 16, 4, 4, 2),
    "another type": torch.zeros(SHAPE, dtype=torch.bfloat16),
    "integers": torch.zeros(SHAPE, dtype=torch.int32),
    "not a number": torch.full(SHAPE, torch.nan),
    "infinity": torch.full(SHAPE, -torch.inf),
    "far too large": torch.zeros(1, 16, 2, 400, 400),
}


@pytest.mark.parametrize("what", STRANGE)
def test_latents_that_the_request_cannot_have_are_not_used(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_latents(tmp_path / "latents", STRANGE[what], ABOUT)
    assert read_latents(tmp_path / "latents", WANTED) is None
    assert f"request {REQUEST.id}: ignoring the latents in" in caplog.text


@pytest.mark.parametrize("blocks", ["[" * 5000, "[1]", "null", "", '{"denoise": {}, "text_encoder": []}', "{}"])
def test_a_description_that_is_none_is_not_used(blocks: str, tmp_path: Path) -> None:
    save_file({"latents": LATENTS}, tmp_path / "latents", ABOUT | {"blocks": blocks})
    assert read_latents(tmp_path / "latents", WANTED) is None


def test_a_file_of_an_older_form_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"latents": LATENTS}, tmp_path / "latents", {"request": "{}", "model": "{}", "sha256": "00"})
    assert read_latents(tmp_path / "latents", WANTED) is None
    assert "as in files of older versions" in caplog.text


def test_other_tensors_beside_the_latents_are_not_used(tmp_path: Path) -> None:
    save_file({"latents": LATENTS, "more": LATENTS.clone()}, tmp_path / "latents", ABOUT)
    assert read_latents(tmp_path / "latents", WANTED) is None


def test_a_link_to_latents_is_not_followed(path: Path) -> None:
    (path.parent / "link").symlink_to(path)
    assert read_latents(path.parent / "link", WANTED) is None


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="latents could not be kept"):
        write_latents(tmp_path / "file" / "latents", LATENTS, ABOUT)
