"""What an HTTP service is given, and what it has learned, beside services that change."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from disagg_ray import load_config
from disagg_ray.errors import ConfigError, DisaggError
from disagg_ray.http.app import HANDLERS
from disagg_ray.http.keys import Keys
from disagg_ray.http.pace import Pace
from disagg_ray.http.settings import override
from disagg_ray.http.store import Job

SPLIT, FUSED = load_config("conf/tiny_t2v.yaml"), load_config("conf/tiny_t2v.yaml", "fused=true")
SIZE = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2}


def job(**seconds: float) -> Job:
    return Job("video_1", "", "films", 0, "a cat", SIZE, {}, "64x64", "1", 0.0, stage_seconds=seconds)


@pytest.mark.parametrize(
    ("key", "value", "must"),
    [
        ("max_bytes", "10", "a whole number or null"), ("max_upload_bytes", None, "a whole number"),
        ("max_bytes", True, "a whole number or null"), ("expires_after_s", "soon", "a number or null"),
        ("database", 5, "text or null"), ("folder", None, "text"),
    ],
)  # fmt: skip
def test_a_setting_of_another_type_is_refused_by_name(key: str, value: Any, must: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(SPLIT, {key: value})
    assert str(caught.value).startswith(f"invalid args.{key}=")
    assert str(caught.value).endswith(f"must be {must}")


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert override(SPLIT, {"max_bytes": 1e6}).service.max_bytes == 1_000_000


def test_keys_that_cannot_be_read_are_no_fault_of_who_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.json"
    keys = Keys(str(file), None)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"keys\.json") as caught:
        keys.authenticate("Bearer sk-x")
    answer = asyncio.run(HANDLERS[DisaggError](Request({"type": "http"}), caught.value))
    assert (answer.status_code, b"keys.json" in answer.body) == (503, False)
    assert "keys.json" in caplog.text


def test_seconds_of_other_stages_predict_nothing() -> None:
    config = FUSED
    pace = Pace(lambda: config)
    pace.learn(job(fused=3.0))
    assert pace.predict(job()) == {"fused": pytest.approx(3.0)}
    config = SPLIT  # taken down, and put up again with other stages
    assert (pace.predict(job()), pace.nothing_s) == ({}, None)
    pace.learn(job(fused=3.0))  # one that finished before
    shares = pace.shares(job())
    assert (shares.keys(), sum(shares.values())) == (SPLIT.stages.keys(), pytest.approx(1))
    pace.learn(job(encoder=1.0, transformer=8.0, decoder=1.0))
    assert pace.shares(job())["transformer"] == pytest.approx(0.8)
