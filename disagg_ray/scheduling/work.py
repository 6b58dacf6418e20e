"""How much work a request is to a stage, in units that its seconds grow with."""

from __future__ import annotations

from disagg_ray.request import ResolvedRequest


def measure(request: ResolvedRequest, blocks: list[str]) -> tuple[float, tuple[int, ...]]:
    """Return how much work a stage has with a request (in steps x pixels), and what makes two requests alike for it."""
    passes = request.num_inference_steps * (2 if request.guided else 1) if "denoise" in blocks else 1
    shape = (request.height, request.width, request.num_frames, passes)
    return float(request.height * request.width * request.num_frames * passes), shape
