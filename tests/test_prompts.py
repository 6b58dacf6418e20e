"""Texts are counted as they are encoded, cleaned first, and refused before work where the tokenizer is at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given
from hypothesis import strategies as st

from disagg_ray import LocalPipeline, Request, RequestError, load_config
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.config.schema import Config
from disagg_ray.models.prompts import check_prompts
from disagg_ray.models.wan.blocks import TextEncoder
from disagg_ray.models.wan.text import prepare
from disagg_ray.request import resolve

CONF = Path(__file__).parents[1] / "conf" / "tiny_t2v.yaml"
SMALL = ("model.max_sequence_length=32", "limits.max_pixels=4096", "limits.max_frames=9", "defaults.num_frames=5")
ASKED: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 1, "guidance_scale": 1.0}
SHRINKS = "&lt;b&gt;  &amp;amp;  " + " " * 40 + "cat"
"""55 characters that clean to 8."""
GROWS = "ﬃ" * 15
"""15 characters that clean to 45."""


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("tiny-t2v")


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return load_config(CONF, f"model.path={folder}", *SMALL)


def check(config: Config, **asked: Any) -> None:
    check_prompts(resolve(Request(**{"prompt": "a", **ASKED, **asked}), config)[0], config.model)


@given(st.text(st.characters(codec="utf-8")))
def test_texts_are_cleaned_as_stock_does(text: str) -> None:
    assert prepare(text) == prompt_clean(text)


def test_a_text_that_fits_once_cleaned_is_encoded_as_stock_does(one_thread: None, config: Config, folder: Path) -> None:
    with LocalPipeline(config) as pipeline:
        ours = pipeline.generate(Request(prompt=SHRINKS, **ASKED, seed=7, format="npy")).frames
    stock = diffusers.WanPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    asked = ASKED | {"num_frames": 5, "max_sequence_length": 32, "generator": torch.Generator().manual_seed(7)}
    assert np.array_equal(ours, stock(SHRINKS, **asked).frames[0])


def test_a_text_that_grows_past_the_limit_is_refused_before_work(config: Config) -> None:
    with pytest.raises(RequestError, match=r"^prompt: 47 tokens are over the model's 32"):
        check(config, prompt=GROWS)
    with pytest.raises(RequestError, match=r"^negative_prompt: 47 tokens"):
        check(config, negative_prompt=GROWS, guidance_scale=5.0)
    check(config, negative_prompt=GROWS)  # which nothing encodes without guidance
    check(config, prompt=SHRINKS)


def test_a_replica_refuses_what_no_driver_could_count(config: Config, folder: Path) -> None:
    stock = diffusers.WanPipeline.from_pretrained(folder)
    with pytest.raises(RequestError, match=r"^prompt: 47 tokens"):
        TextEncoder().encode_prompt(stock, GROWS, torch.device("cpu"), False, None, 32)


def test_the_longest_text_that_fits_is_let_through(config: Config) -> None:
    check(config, prompt="x" * 30)
    with pytest.raises(RequestError, match="33 tokens"):
        check(config, prompt="x" * 31)


def test_a_model_elsewhere_is_counted_there(config: Config, tmp_path: Path) -> None:
    elsewhere = load_config(CONF, f"model.path={tmp_path / 'none'}", *SMALL)
    check(elsewhere, prompt=GROWS)
    assert not (tmp_path / "none").exists()


def test_lines_of_a_batch_are_counted_before_it_starts(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "a cat"}\n{"prompt": "' + GROWS + '"}\n')
    bad: list[tuple[int, str]] = []
    with RequestsFile(path, config) as requests:
        requests.scan(lambda number, fault: bad.append((number, fault)))
    assert [number for number, _ in bad] == [2]
    assert "47 tokens" in bad[0][1]
