"""Made-up requests and tensors of real sizes, on which a stage warms up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disagg_ray.config.options import TILES
from disagg_ray.graph import CONTROLS, IMAGES
from disagg_ray.inputs import REFERENCES, GivenImage
from disagg_ray.models.checkpoint import Checkpoint
from disagg_ray.request import ResolvedRequest


def example_request(checkpoint: Checkpoint, size: Sequence[int]) -> ResolvedRequest:
    """Return a request of that (height, width, num_frames) with just the steps that reach every transformer."""
    height, width, num_frames = size
    few = 4 if checkpoint.geometry.two_transformers else 2
    return ResolvedRequest(
        id="warm-up",
        prompt="warm-up",
        negative_prompt="",
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=len(checkpoint.model.sigmas) or few,
        guidance_scale=1.0,
        guidance_scale_2=None,
        seed=0,
        fps=16,
        format="npy",
        priority=0,
        images={_first(name): GivenImage(height, width, "") for name in checkpoint.model.traits.images},
    )


def example_tensors(checkpoint: Checkpoint, names: Sequence[str], size: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return tensors of zeros in place of other stages' outputs and of the request's images, on the CPU.

    What a model can do without is left out: what VACE makes of no control video is as large.
    """
    height, width, num_frames = size
    tiles = [name for name in names if name.startswith(TILES)]
    most = checkpoint.geometry.tensor_bytes(height * width, num_frames, 0, len(tiles))
    shapes = checkpoint.geometry.tensor_shapes(height, width, num_frames)
    shapes |= {name: (most[name] // 4,) for name in tiles}
    pixels, left_out = torch.zeros(height, width, 3, dtype=torch.uint8), CONTROLS - {*checkpoint.model.traits.images}
    images = {name: pixels.flatten() if name == REFERENCES else pixels for name in IMAGES}
    return {
        name: images[name] if name in IMAGES else torch.zeros(shapes[name])
        for name in names
        if name != "negative_prompt_embeds" and name not in left_out
    }


def _first(name: str) -> str:
    """Return the name of a field's only or first image."""
    return f"{name}[0]" if name == REFERENCES else name
