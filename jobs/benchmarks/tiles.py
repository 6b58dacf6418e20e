"""Seconds from the last denoising step to the frames: decoded whole, in tiles, and in tiles by several decoders."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil

from disagg_ray import Config, Pipeline, Request, load_config
from disagg_ray.config.options import BLEND, VaeConfig, name_parts
from disagg_ray.result import Result


def measure(path: str, overrides: Sequence[str], num_parts: int, repeats: int) -> dict[str, Any]:
    """Time one request at a time, in one pipeline after another."""
    config = load_config(path, *overrides)
    decoder = next(name for name, stage in config.stages.items() if stage.blocks == ["decode"])
    size = config.defaults.height, config.defaults.width, config.defaults.num_frames
    ways = {
        "whole": config,
        "tiles, 1 decoder": _tile(config, decoder),
        f"tiles, {num_parts} decoders": _cut(config, decoder, num_parts),
    }
    rows = {name: _run(way, repeats) for name, way in ways.items()}
    whole, one, several = (row["decode_s"] for row in rows.values())
    return {"size": size, "repeats": repeats, **rows, "of_one_in_tiles": several / one, "of_whole": several / whole}


def _tile(config: Config, decoder: str) -> Config:
    stage = config.stages[decoder]
    return replace(config, stages=config.stages | {decoder: replace(stage, vae=replace(stage.vae, tile_pixels=0))})


def _cut(config: Config, decoder: str, num_parts: int) -> Config:
    """Give each part and the blending what the decoder has; nothing shares a GPU by name any more."""
    stages = dict(config.stages)
    stage = stages.pop(decoder)
    stage = replace(stage, vae=replace(stage.vae, tile_pixels=None))
    for number, part in enumerate(name_parts(num_parts), 1):
        stages[f"{decoder}_{number}"] = replace(stage, blocks=[part])
    stages["join"] = replace(stage, blocks=[BLEND], vae=VaeConfig(), num_gpus=stage.num_gpus / 4)  # no weights
    return replace(config, stages=stages, share_gpu=[])


def _run(config: Config, repeats: int) -> dict[str, Any]:
    requests = [
        Request("a red circle moving left", seed=seed, num_inference_steps=1, format="npy")
        for seed in range(repeats + 1)
    ]
    load = psutil.getloadavg()[0]
    denoiser = next(name for name, stage in config.stages.items() if "denoise" in stage.blocks)
    with Pipeline(config) as pipeline:
        _, *results = [pipeline.generate(request) for request in requests]  # the first is a warm-up
    decodes = [_decode_s(result, denoiser) for result in results]
    stages = zip(*(result.stages for result in results), strict=True)
    return {
        "decode_s": statistics.median(decodes),
        "all_decode_s": decodes,
        "load_before": load,
        "stages": {
            timings[0].stage: {
                name: statistics.median(getattr(t, name) for t in timings)
                for name in ("queue_s", "pull_s", "compute_s", "publish_s", "pulled_bytes", "peak_bytes")
            }
            for timings in stages
        },
    }


def _decode_s(result: Result, denoiser: str) -> float:
    """Return the seconds from published latents to frames, by the clock that the replicas share."""
    latents = next(timing for timing in result.stages if timing.stage == denoiser)
    last = result.stages[-1]
    return last.started + last.compute_s - latents.started - latents.compute_s - latents.publish_s
