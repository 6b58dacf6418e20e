"""Videos of a gang beside those of one process with the same options, on CPUs and on GPUs alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_image

from disagg_ray import LocalPipeline, Pipeline, Request

CONF = Path(__file__).parent.parent / "conf"
T = "stages.transformer"
SURE = 240.0
"""Seconds; what takes longer hangs."""


@dataclass(frozen=True)
class Place:
    """Overrides that say where a gang runs, and where the one process."""

    gang: tuple[str, ...]
    one: tuple[str, ...]


CPU = Place((f"{T}.num_threads=1",), (f"{T}.num_threads=1",))
GPU = Place(
    (f"{T}.num_gpus=0.8", "stages.encoder.num_gpus=0.1", "stages.decoder.num_gpus=0.1"),
    tuple(f"stages.{stage}.device=cuda" for stage in ("encoder", "transformer", "decoder")),
)
"""A GPU a rank; encoder and decoder take a part of one of them."""


def make_requests(task: str) -> list[Request]:
    """Return requests of three sizes, the second without guidance."""
    asked: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3, "seed": 5, "format": "npy"}
    if task == "ti2v":
        asked |= {"height": 64, "width": 96}
    if "i2v" in task and task != "ti2v":
        asked |= {"image": make_image(60, 40)}
    cases = ((5, 5.0), (9, 1.0), (13, 5.0))
    return [Request("a red circle", num_frames=frames, guidance_scale=scale, **asked) for frames, scale in cases]


def difference(place: Place, task: str, parallel: str, *overrides: str) -> float:
    """Return how far the frames of a gang, submitted at once, are from those of one process at most; 0: identical."""
    config, requests = CONF / f"tiny_{task}.yaml", make_requests(task)
    with LocalPipeline.from_config(config, *place.one, *overrides) as local:
        expected = [local.generate(request).frames for request in requests]
    with Pipeline.from_config(config, *place.gang, f"{T}.parallel={parallel}", *overrides) as pipeline:
        made = [handle.result(SURE).frames for handle in [pipeline.submit(request) for request in requests]]
    pairs = zip(made, expected, strict=True)
    return max(float(np.abs(ours.astype(float) - theirs.astype(float)).max()) for ours, theirs in pairs)
