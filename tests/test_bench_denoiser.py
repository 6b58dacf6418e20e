"""The denoiser's benchmark runs on a tiny model on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import denoiser
from benchmarks.denoiser_model import Model

from disagg_ray.models.wan.shapes import get_shape


@pytest.mark.parametrize(("what", "most"), [("forward", 0.02), ("drift", 0.02)])
def test_each_option_stands_beside_stock_with_its_difference(what: str, most: float, tmp_path: Path) -> None:
    options = "stock/flash_4/flash_4, gelu"
    denoiser.main([what, "--quick", "--repeats", "1", "--options", options, "--output", str(tmp_path)])
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    found = {row["option"]: row["difference"]["rms"] for row in rows if "difference" in row}
    assert found.keys() == set(options.split("/"))
    assert found["stock"] == 0
    assert max(found.values()) < most


def test_an_option_that_fails_is_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    denoiser.main(["forward", "--quick", "--repeats", "1", "--options", "stock/nothing", "--output", str(tmp_path)])
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert any(row.get("option") == "stock" and "seconds" in row for row in rows)
    assert any(row.get("option") == "nothing" and "KeyError" in row["error"] for row in rows)


@pytest.mark.parametrize(("shape", "latents"), [("tiny-t2v", (1, 16, 2, 8, 12)), ("tiny-ti2v", (1, 48, 2, 4, 6))])
def test_inputs_are_of_the_shape_s_own_latents(shape: str, latents: tuple[int, ...]) -> None:
    made = Model(get_shape(shape), (64, 96, 5), "cpu").forward()
    assert made.shape == latents
    assert torch.isfinite(made).all()
