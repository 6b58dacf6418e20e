"""Latents of a first frame, for models of text that take one too."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from torch import Tensor

IMAGE_LATENTS = "image_latents"
"""Latents of the given first frame, float32 (1, channels, 1, height, width), normalised."""


class EncodeFirstFrame(ModularPipelineBlocks):  # type: ignore[misc]
    """Makes latents of the request's image, if it has one."""

    processor: ClassVar[str]
    """Name of the component that prepares the image."""

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("image"), InputParam("height", required=True), InputParam("width", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(IMAGE_LATENTS)]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        image, vae = state.get("image"), components.vae
        if image is not None:
            size = {"height": state.get("height"), "width": state.get("width")}
            pixels = getattr(components, self.processor).preprocess(image, **size).unsqueeze(2)
            encoded = vae.encode(pixels.to(components._execution_device, vae.dtype))
            state.set(IMAGE_LATENTS, self.normalise(vae, encoded.latent_dist.mode().float()))
        return components, state

    @staticmethod
    @abstractmethod
    def normalise(vae: Any, latents: Tensor) -> Tensor:
        """Return latents as the denoiser takes them."""
