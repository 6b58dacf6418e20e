"""Every kind of model on a GPU: stages on Ray make what they make in one process, and nearly what a CPU makes.

`pytest -p no:skipping -o addopts= tests/gpu/test_families_gpu.py` runs the same on CPUs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_vace import write_frames

from disagg_ray import LocalPipeline, Pipeline, Request, load_config
from disagg_ray.config.schema import Config
from disagg_ray.inputs import FIELDS, MASK, REFERENCES, VIDEO

CONF = Path(__file__).parents[2] / "conf"
KINDS = sorted(path.stem for path in CONF.glob("tiny_*.yaml"))
ON_GPU = torch.cuda.is_available()
STAGES = ("encoder", "transformer", "decoder")
LOCAL = [f"stages.{stage}.device={'cuda' if ON_GPU else 'cpu'}" for stage in STAGES]
ON_RAY = [f"stages.{stage}.num_gpus=0.3" for stage in STAGES] if ON_GPU else []
CLOSE = 0.05
"""How far frames (0 to 1) of a GPU may be from a CPU's: other kernels round otherwise, from step to step."""

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]


def ask(config: Config, image: Callable[..., Image.Image], folder: Path) -> Request:
    """Return a guided request with every file that the model takes."""
    sides = config.defaults.width, config.defaults.height
    frames = [image(*sides, seed) for seed in range(config.defaults.num_frames)]
    given: dict[str, Any] = {name: frames[n] for n, name in enumerate(config.model.traits.takes) if name in FIELDS}
    if VIDEO in given:
        given |= {VIDEO: write_frames(folder / "frames", frames), MASK: frames[-1]}
    if REFERENCES in given:
        given[REFERENCES] = [image(80, 48), image(48, 64)]
    return Request('a "red" circle', seed=7, num_inference_steps=2, guidance_scale=3.0, format="npy", **given)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_on_ray_make_what_one_process_makes(
    cluster: None, image: Callable[..., Image.Image], tmp_path: Path, kind: str
) -> None:
    conf = CONF / f"{kind}.yaml"
    request = ask(load_config(conf), image, tmp_path)
    with Pipeline.from_config(conf, *ON_RAY) as pipeline:
        split = pipeline.generate(request)
    with LocalPipeline.from_config(conf, *LOCAL) as pipeline:
        whole = pipeline.generate(request)
    with LocalPipeline.from_config(conf, *(f"stages.{stage}.device=cpu" for stage in STAGES)) as pipeline:
        on_cpu = pipeline.generate(request)
    assert split.frames is not None and whole.frames is not None and on_cpu.frames is not None
    print(f"{kind}: {np.abs(whole.frames - on_cpu.frames).max():.2g} from a CPU's")
    assert np.array_equal(split.frames, whole.frames)
    assert np.abs(whole.frames - on_cpu.frames).max() < CLOSE
