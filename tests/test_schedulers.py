"""Every draw of noise comes from the request's seed, those of schedulers that draw at each step too."""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from disagg_ray import LocalPipeline, Request

CONF = Path(__file__).parents[1] / "conf"
SMALL = ("model.max_sequence_length=64", "limits.max_pixels=4096", "limits.max_frames=9", "defaults.num_frames=9")
ASKED: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "blurry", "height": 32, "width": 48, "num_frames": 5,
    "num_inference_steps": 4, "guidance_scale": 5.0,
}  # fmt: skip
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

DRAWING: dict[str, tuple[str, dict[str, Any]]] = {
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **FLOW}),
    "sde, single step": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", **FLOW}),
    "stochastic euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    "ancestral": ("LTXEulerAncestralRFScheduler", {}),
    "stochastic adams": ("SASolverScheduler", FLOW),
}
"""Schedulers that draw at each step, and their configurations."""


def with_scheduler(source: Path, folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Make a checkpoint that differs from another by its scheduler alone."""
    shutil.copytree(source, folder, copy_function=os.link)
    for file, content in (
        (
            "model_index.json",
            json.loads((source / "model_index.json").read_text()) | {"scheduler": ["diffusers", name]},
        ),
        ("scheduler/scheduler_config.json", {"_class_name": name, **settings}),
    ):
        (folder / file).unlink()
        (folder / file).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the checkpoint of one of `DRAWING`."""
    made = tmp_path_factory.mktemp("schedulers")
    return cache(lambda key: with_scheduler(checkpoint("tiny-t2v"), made / key.replace(" ", "-"), *DRAWING[key]))


def frames(pipeline: LocalPipeline, seed: int = 7) -> np.ndarray:
    return pipeline.generate(Request(**ASKED, seed=seed, format="npy")).frames


@pytest.mark.parametrize("name", DRAWING)
def test_noise_of_each_step_follows_from_the_seed(one_thread: None, folder: Callable[[str], Path], name: str) -> None:
    path = f"model.path={folder(name)}"
    with LocalPipeline.from_config(CONF / "tiny_t2v.yaml", path, *SMALL) as pipeline:
        first, other, again = (frames(pipeline, seed) for seed in (7, 8, 7))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    with LocalPipeline.from_config(CONF / "tiny_t2v.yaml", path, *SMALL, "fused=true") as fused:
        torch.manual_seed(0)
        assert np.array_equal(frames(fused), first)
    stock = diffusers.WanPipeline.from_pretrained(folder(name))
    stock.set_progress_bar_config(disable=True)
    torch.manual_seed(7)  # stock gives its generator to the first noise alone; this way both come from one stream
    assert np.array_equal(stock(**ASKED, max_sequence_length=64).frames[0], first)


ROUNDED = 1000.0
"""A shift with which UniPC's first two timesteps are the same whole number; 16, FLF2V's, does it from 64 steps on."""


def test_first_timesteps_that_are_the_same_number_are_two_steps(
    one_thread: None, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint("tiny-t2v")
    with LocalPipeline.from_config(
        CONF / "tiny_t2v.yaml", f"model.path={path}", *SMALL, f"model.flow_shift={ROUNDED}"
    ) as pipeline:
        made = frames(pipeline)
    stock = diffusers.WanPipeline.from_pretrained(path)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config, flow_shift=ROUNDED)
    generator = torch.Generator("cpu").manual_seed(7)
    assert np.array_equal(stock(**ASKED, generator=generator, max_sequence_length=64).frames[0], made)
    first, second, *_ = stock.scheduler.timesteps
    assert first == second
